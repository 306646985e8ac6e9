"""What a run is asked to do, checked before anything heavy is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from eval.cell import Cell
from eval.methods import method_at
from eval.tasks import BENCHMARKS, GROUP, SUITE, TASKS, mirrored

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = "checkpoints/llava-mini"
DEFAULT_BATCH_SIZE = 8
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def cells(args) -> list[Cell]:
    """Turn the parsed arguments of ``eval.run`` into cells: per task the untouched model, then every budget.

    Parameters
    ----------
    args : argparse.Namespace
        Of ``eval.run``'s parser; everything may be text.

    Raises
    ------
    ValueError
        With one line that names the argument, the value and what would be right.
    """
    named = benchmarks(args.task)
    limit = whole_number("LIMIT", args.limit)
    batch_size = whole_number("BATCH_SIZE", args.batch_size) or DEFAULT_BATCH_SIZE
    retains = retained_tokens(args.retain)
    model = check_model(args.model)
    tasks = check_tasks(named, model, limit)
    common = {
        "model": model,
        "limit": limit,
        "batch_size": batch_size,
        "seed": args.seed,
        "device": args.device or None,
        "device_map": args.device_map,
        "dtype": args.dtype,
        "attn_implementation": args.attn_implementation,
        "conv_template": args.conv_template,
    }
    methods = [(retain, method_at(model, args.method, retain, args.configs)[0]) for retain in retains]
    return [
        cell
        for benchmark, task in tasks
        for cell in (
            Cell(**common, benchmark=benchmark, task=task),
            *(
                Cell(**common, benchmark=benchmark, task=task, method=args.method, retain=retain, settings=settings)
                for retain, settings in methods
            ),
        )
    ]


def is_embedded(model: str) -> bool:
    """Whether a model is the one this repository carries, which answers only its own synthetic benchmarks."""
    return Path(model).name.startswith("llava-mini")


def check_model(model: str, online: bool = True) -> str:
    """A model's folder, as an absolute path where it was found relative to the repository, or its hub id.

    Without `online`, whether the hub has it is left open.

    Raises
    ------
    ValueError
        If there is neither.
    """
    for folder in (Path(model).expanduser(), ROOT / model):
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ValueError(f"MODEL: the folder {model!r} has no config.json, so it is no checkpoint")
            return model if folder == Path(model) else str(folder)
    looks_local = model.startswith((".", "/", "~")) or Path(model).parts[:1] == (Path(EMBEDDED).parts[0],)
    if looks_local or not HUB_ID.fullmatch(model):
        raise ValueError(
            f"MODEL: there is no folder {model!r}; give a checkpoint's folder or a hub id such as owner/name"
        )
    if online:
        _check_hub(model)
    return model


def check_out(out: Path) -> Path:
    """A folder that can be written to, or made.

    Raises
    ------
    ValueError
        If it cannot.
    """
    existing = out.expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"OUT: {str(existing)!r} is a file, expected a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"OUT: {str(out)!r} cannot be written to")
    return out.expanduser()


def benchmarks(names: str | Sequence[str]) -> list[str]:
    """Names of benchmarks or of synthetic tasks, ``mini`` standing for all of the latter.

    Raises
    ------
    ValueError
        If a name is neither.
    """
    known = [*BENCHMARKS, *SUITE, GROUP]
    found: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        if name not in known:
            raise ValueError(f"task: got {name!r}, expected some of {', '.join(known)}")
        found.update(dict.fromkeys(SUITE if name == GROUP else [name]))
    return list(found)


def check_tasks(names: Sequence[str], model: str, limit: int | None, online: bool = True) -> list[tuple[str, str]]:
    """Pairs of benchmark and lmms-eval task; the embedded model gets the synthetic tasks, each once.

    Without `online`, whether what they need from the internet is there is left open.

    Raises
    ------
    ValueError
        If a task cannot be run here.
    """
    pairs: dict[str, str] = {}
    for name in names:
        if name in SUITE:
            task, benchmark = name, mirrored(name)
        else:
            task, benchmark = BENCHMARKS[name].mini if is_embedded(model) else BENCHMARKS[name].stock, name
            if online:
                _check_access(task)
        if limit and limit % TASKS[task].group:
            raise ValueError(f"LIMIT: got {limit}, but {task} scores questions by {TASKS[task].group}")
        pairs.setdefault(task, benchmark)
    return [(benchmark, task) for task, benchmark in pairs.items()]


def whole_number(name: str, value: str | int | None) -> int | None:
    """A whole number above 0, or None for nothing."""
    if value is None or not str(value).strip():
        return None
    if not re.fullmatch(r"0*[1-9]\d*", str(value).strip()):
        raise ValueError(f"{name}: got {value!r}, expected a whole number above 0")
    return int(value)


def retained_tokens(value: list[str] | str) -> list[int]:
    """Numbers of tokens from ``"192 128 64"``, with commas or as a list; doubles count once."""
    words = (value if isinstance(value, str) else " ".join(map(str, value))).replace(",", " ").split()
    if not words:
        raise ValueError("RETAIN: got nothing, expected numbers of vision tokens such as 192 128 64")
    return list(dict.fromkeys(whole_number("RETAIN", word) for word in words))


def _check_hub(model: str) -> None:
    """See that a hub id leads to a model, in the local cache or on the hub."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return
    try:
        HfApi().model_info(model, timeout=20)
    except GatedRepoError:
        raise ValueError(
            f"MODEL: {model!r} asks for your consent on the hub, and for a token (hf auth login)"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(f"MODEL: {model!r} is neither a folder nor a model on the Hugging Face hub") from None
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError, RuntimeError):
        raise ValueError(
            f"MODEL: {model!r} is neither a folder nor in the local cache, and the Hugging Face hub cannot be reached"
        ) from None
    except Exception as error:  # whatever the HTTP library of the day raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"MODEL: {model!r} could not be looked up on the hub ({reason})") from None


def _check_access(task: str) -> None:
    """See that what a task needs from the internet is there; without it, it would fail minutes later."""
    from huggingface_hub import constants, get_token

    if TASKS[task].gated and get_token() is None and not constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"task: lmms-eval downloads {task} with a Hugging Face token; run 'hf auth login' or set HF_TOKEN"
        )
    if TASKS[task].judge and not os.environ.get("OPENAI_API_KEY"):
        raise ValueError(f"task: a language model on the internet scores {task}; set OPENAI_API_KEY")
