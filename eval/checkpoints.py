"""Which checkpoint a command is to load: found, and looked over by the loader's own code, before anything is loaded."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

from llava.constants import PROTOCOLS
from mustdrop.checks import shown
from mustdrop.command import text

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = "checkpoints/llava-mini"
LOADING = ("model_base", "load_4bit", "load_8bit", "protocol")
"""What decides, besides the model's folder, which model is loaded: arguments of ``load_pretrained_model``."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


def add_options(new: argparse.ArgumentParser) -> None:
    """Options of every command that loads a user's checkpoint."""
    new.add_argument(
        "--model-base",
        metavar="MODEL_BASE",
        type=text,
        default=os.environ.get("MODEL_BASE") or None,
        help="folder or hub id of the model under a checkpoint that holds only a projector or LoRA weights",
    )
    new.add_argument(
        "--protocol",
        metavar="PROTOCOL",
        type=text,
        default=os.environ.get("PROTOCOL") or None,
        help="flat: LLaVA-NeXT on two by two tiles, nothing cut off, no newlines, the 2880 tokens of papers "
        "(default: as the model does it)",
    )
    bits = new.add_mutually_exclusive_group()
    bits.add_argument("--load-4bit", action="store_true", help="quantise the language model with bitsandbytes")
    bits.add_argument("--load-8bit", action="store_true", help="the same in 8 bits")


def flag(name: str, value: bool | str) -> bool:
    """True or false, which lmms-eval's ``--model_args`` may bring as text; ValueError for anything else."""
    flags = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in flags:
        raise ValueError(f"{name}: got {shown(value)}, expected True or False")
    return flags[str(value).lower()]


def loading(args: argparse.Namespace) -> dict:
    """The options of `add_options` that were given, as ``eval.run.inference.LoadedModel.load`` takes them."""
    given = {name: getattr(args, name) for name in LOADING}
    return {name: value for name, value in given.items() if name != "protocol" or value is not None}


def check_checkpoint(
    model: str,
    model_base: str | None = None,
    load_4bit: bool = False,
    load_8bit: bool = False,
    protocol: str | None = None,
    online: bool = True,
) -> dict:
    """See that a checkpoint can be loaded, without loading it: names and shapes of all weights, tokenizer, processor.

    What would have to be downloaded first is left to the loader, but for a vision tower that a folder names; the
    embedded model is taken to be whole.

    Parameters
    ----------
    model, model_base, load_4bit, load_8bit, protocol
        As ``load_pretrained_model`` takes them.
    online : bool
        Whether the hub may be asked.

    Returns
    -------
    dict
        ``model`` and ``model_base`` as `check_model` returns them, ``load_4bit``, ``load_8bit``,
        ``protocol``.

    Raises
    ------
    ValueError
        With the line that the loader would say.
    """
    if load_4bit and load_8bit:
        raise ValueError("load_4bit, load_8bit: got both, expected one of them")
    found = check_model(model, online)
    base = None if model_base is None else check_model(model_base, online, "MODEL_BASE")
    wanted = {"model": found, "model_base": base, "load_4bit": load_4bit, "load_8bit": load_8bit, "protocol": protocol}
    if protocol not in (None, *PROTOCOLS):
        raise ValueError(f"protocol: got {shown(protocol)}, expected one of {', '.join(PROTOCOLS)}")
    under = base or _named(found, "adapter_config.json", "base_model_name_or_path")
    if online and base is None and on_hub(under):
        _check_hub(under, "MODEL_BASE")
    tower = _named(config_folder(found, base), "config.json", "mm_vision_tower")
    away = any(map(on_hub, (found, under))) or (not online and on_hub(tower))
    if load_4bit or load_8bit or protocol or not (away or (base is None and _is_the_embedded_one(found))):
        _look_over(wanted, away)
    return wanted


def check_arguments(args: argparse.Namespace) -> str:
    """`check_checkpoint` of a command line; ``args`` get the places that were found. Returns the model's."""
    for name, value in check_checkpoint(args.model, **loading(args)).items():
        setattr(args, name, value)
    return args.model


def check_model(model: str, online: bool = True, name: str = "MODEL") -> str:
    """A model's folder, as an absolute path where it was found relative to the repository, or its hub id.

    Without `online`, whether the hub has it is left open. What a folder holds is `check_checkpoint`'s matter.

    Raises
    ------
    ValueError
        If there is neither.
    """
    if not isinstance(model, str) or not model.strip() or "\0" in model:
        raise ValueError(f"{name}: got {shown(model)}, expected a checkpoint's folder or a hub id such as owner/name")
    for folder in (expanded(Path(model)), ROOT / model):
        if folder.is_dir():
            return model if folder == Path(model) else str(folder)
    looks_local = model.startswith((".", "/", "~")) or Path(model).parts[:1] == (Path(EMBEDDED).parts[0],)
    if looks_local or not _HUB_ID.fullmatch(model):
        raise ValueError(
            f"{name}: there is no folder {shown(model)}; give a checkpoint's folder or a hub id such as owner/name"
        )
    if online:
        _check_hub(model, name)
    return model


def config_folder(model: str, model_base: str | None = None) -> str:
    """Where the config.json of a model lies that is used: its own folder or hub id, or its base's."""
    if not Path(model).is_dir() or (Path(model) / "config.json").is_file():
        return model
    return model_base or _named(model, "adapter_config.json", "base_model_name_or_path") or model


def is_embedded(model: str) -> bool:
    """Whether a model is the one this repository carries, which answers only its own synthetic benchmarks."""
    return Path(model).name.startswith("llava-mini")


def on_hub(model: str | None) -> bool:
    """Whether this can only be a hub id."""
    return model is not None and bool(_HUB_ID.fullmatch(model)) and not Path(model).is_dir()


def expanded(path: Path) -> Path:
    """The path with ~ and ~name as the home folder; as it is where there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _is_the_embedded_one(model: str) -> bool:
    return Path(model).resolve() == ROOT / EMBEDDED


def _named(model: str, file: str, field: str) -> str | None:
    """The checkpoint that a configuration in a model's folder names, beside it or elsewhere; None if it names none."""
    try:
        value = json.loads((Path(model) / file).read_text(encoding="utf-8"))[field]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # the loader will say what is wrong with it
        return None
    if not isinstance(value, str) or not value:
        return None
    beside = Path(model) / value
    return str(beside) if (beside / "config.json").is_file() else value


def _look_over(wanted: dict, away: bool) -> None:
    """All that the loader does before it reads weights; of a checkpoint that is away, only what it depends on here."""
    from llava.model.builder import check_stock, check_tokenizer, set_protocol
    from llava.model.checkpoint import describe_checkpoint
    from llava.model.checkpoint.load import check_weights
    from llava.model.checkpoint.quantised import resolve_quantisation
    from llava.model.checkpoint.settings import LoadSettings
    from llava.model.hosted.load import load_stock_processor, stock_config
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.processor import load_processor
    from llava.model.tokenizer import load_tokenizer, tokenizer_folder

    settings = LoadSettings.of(wanted["load_8bit"], wanted["load_4bit"], None, "cpu", {})
    if away:
        return
    try:
        if stock := stock_config(wanted["model"]):
            check_stock(stock[1], wanted["model_base"], protocol=wanted["protocol"])
            load_stock_processor(*stock)
            return
        checkpoint = describe_checkpoint(wanted["model"], LlavaConfig, wanted["model_base"])
        set_protocol(checkpoint, wanted["protocol"])
        check_weights(LlavaLlamaForCausalLM, checkpoint)
        check_tokenizer(load_tokenizer(tokenizer_folder(checkpoint.folders)), checkpoint)
        load_processor(checkpoint.folders, checkpoint.config)
        resolve_quantisation(checkpoint, settings.arguments.get("quantization_config"))
    except ValueError as error:
        own = str(error).startswith(("model_base", "load_"))
        raise ValueError(str(error) if own else f"MODEL: {error}") from None


def _check_hub(model: str, name: str) -> None:
    """See that a hub id leads to a model, in the local cache or on the hub."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return
    try:
        HfApi().model_info(model, timeout=20)
    except GatedRepoError:
        raise ValueError(
            f"{name}: {model!r} asks for your consent on the hub, and for a token (hf auth login)"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(f"{name}: {model!r} is neither a folder nor a model on the Hugging Face hub") from None
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError, RuntimeError):
        raise ValueError(
            f"{name}: {model!r} is neither a folder nor in the local cache, and the Hugging Face hub cannot be reached"
        ) from None
    except Exception as error:  # whatever the HTTP library of the day raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name}: {model!r} could not be looked up on the hub ({reason})") from None
