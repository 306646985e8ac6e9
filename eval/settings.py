"""What a run is asked to do, checked before anything heavy is imported."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from eval.methods import method_file
from eval.tasks import BENCHMARKS, Benchmark, is_local

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = "checkpoints/llava-mini"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Settings:
    """A checked run.

    Attributes
    ----------
    task, metric : str
        lmms-eval's task and the per-sample score to average.
    model : str
        Folder or hub id.
    methods : tuple of (name, retain or None, settings source)
        What to evaluate, the untouched model first; the source is a YAML path or a settings dictionary.
    limit : int or None
        Number of questions.
    out : pathlib.Path
        Folder of ``summary.json``.
    batch_size : int or None
        None: chosen for the device.
    device, dtype, attn_implementation, conv_template : str
        As in ``eval.inference``; an empty device means the best there is.
    seed : int
        Of everything random.
    """

    task: str
    metric: str
    model: str
    methods: tuple[tuple[str, int | None, object], ...]
    limit: int | None
    out: Path
    batch_size: int | None
    device: str
    device_map: str | None
    dtype: str
    attn_implementation: str
    conv_template: str
    seed: int

    @property
    def model_name(self) -> str:
        """The last part of the model's path or id."""
        return Path(self.model).name


def check(args) -> Settings:
    """Turn parsed arguments into settings.

    Parameters
    ----------
    args : argparse.Namespace
        Of ``eval.run``'s parser; everything may be text.

    Raises
    ------
    ValueError
        With one line that names the argument, the value and what would be right.
    """
    task, metric = _task(args.task, args.model)
    limit = whole_number("LIMIT", args.limit)
    batch_size = whole_number("BATCH_SIZE", args.batch_size)
    retains = retained_tokens(args.retain)
    model = check_model(args.model)
    methods = [("vanilla", None, {"method": "vanilla"})]
    methods += [(args.method, retain, method_file(model, retain, args.method, args.configs)) for retain in retains]
    name = f"{task}-{Path(model).name}" + (f"-limit{limit}" if limit else "")
    out = check_out(Path(args.out or Path("results") / name))
    if not is_local(task) and BENCHMARKS[args.task].gated:
        _check_token(task)
    return Settings(
        task=task,
        metric=metric,
        model=model,
        methods=tuple(methods),
        limit=limit,
        out=out,
        batch_size=batch_size,
        device=args.device or "",
        device_map=args.device_map,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        conv_template=args.conv_template,
        seed=args.seed,
    )


def is_embedded(model: str) -> bool:
    """Whether a model is the one this repository carries, which answers only its own synthetic benchmarks."""
    return Path(model).name.startswith("llava-mini")


def check_model(model: str) -> str:
    """A model's folder, as an absolute path where it was found relative to the repository, or its hub id.

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


def _task(name: str, model: str) -> tuple[str, str]:
    """lmms-eval's task for a benchmark's name, and the metric; the embedded model gets the synthetic one."""
    local = {benchmark.mini: benchmark for benchmark in BENCHMARKS.values()}
    if name in local:
        return name, local[name].metric
    if name not in BENCHMARKS:
        raise ValueError(f"task: got {name!r}, expected one of {', '.join([*BENCHMARKS, *local])}")
    benchmark: Benchmark = BENCHMARKS[name]
    return (benchmark.mini if is_embedded(model) else benchmark.stock), benchmark.metric


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


def _check_token(task: str) -> None:
    """lmms-eval's GQA is downloaded with a token only; without one it would fail minutes later."""
    from huggingface_hub import constants, get_token

    if get_token() is None and not constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"task: lmms-eval downloads {task} with a Hugging Face token; run 'hf auth login' or set HF_TOKEN"
        )
