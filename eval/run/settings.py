"""What a run is asked to do, checked before anything heavy is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from eval.checkpoints import check_checkpoint, expanded, is_embedded, loading
from eval.methods import method_at
from eval.run.cell import Cell, expand
from eval.tasks import BENCHMARKS, GROUP, LOCAL, SUITE, TASKS, mirrored, video_qa
from mustdrop.checks import hint, shown
from mustdrop.command import needed_number, share_of, whole_number

DEFAULT_BATCH_SIZE = 8
NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
LONGEST_NAME = 255
LARGEST_BATCH, LARGEST_SEED, MANY = 4096, 2**32 - 1, 1000


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
    batch_size = whole_number("BATCH_SIZE", args.batch_size, most=LARGEST_BATCH) or DEFAULT_BATCH_SIZE
    seed = needed_number("seed", args.seed, least=0, most=LARGEST_SEED)
    retains = retained_tokens(args.retain)
    check_name("--method", args.method)
    check_loading(
        args.device,
        device_map=args.device_map,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        conv_template=args.conv_template,
    )
    checkpoint = check_checkpoint(args.model, **loading(args))
    model = checkpoint["model"]
    tasks = check_tasks(named, model, limit, skips=args.skip_unfit)
    common = {
        **checkpoint,
        "limit": limit,
        "batch_size": batch_size,
        "device": args.device or None,
        "device_map": args.device_map,
        "dtype": args.dtype,
        "attn_implementation": args.attn_implementation,
        "conv_template": args.conv_template,
    }
    methods = [
        {"method": args.method, "retain": retain, "settings": method_at(model, args.method, retain, args.configs)[0]}
        for retain in retains
    ]
    return expand(common, tasks, [seed], methods)


def check_out(out: Path) -> Path:
    """A folder that can be written to, or made.

    Raises
    ------
    ValueError
        If it cannot.
    """
    out = expanded(out)
    _check_name_lengths(out)
    existing = out.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        found = "a file" if existing.exists() else "a link to nothing"
        raise ValueError(f"OUT: {shown(str(existing))} is {found}, expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"OUT: {shown(str(out))} cannot be written to")
    return out


def check_file(name: str, file: Path) -> Path:
    """A file that can be written, in a folder that there is or that can be made.

    Raises
    ------
    ValueError
        If it cannot.
    """
    file = expanded(file)
    _check_name_lengths(file)
    if file.is_dir():
        raise ValueError(f"{name}: {shown(str(file))} is a folder, expected a file")
    if os.path.lexists(file) and not os.access(file, os.W_OK):
        raise ValueError(f"{name}: {shown(str(file))} cannot be written")
    check_out(file.parent)
    return file


def _check_name_lengths(path: Path) -> None:
    long = next((part for part in path.parts if len(os.fsencode(part)) > LONGEST_NAME), None)
    if long is not None:
        raise ValueError(f"OUT: the name {shown(long)} is longer than {LONGEST_NAME} bytes")


def check_name(option: str, name: str) -> str:
    """A name that is safe in the names of files: of methods, tasks, results."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{option}: got {shown(name)}, expected a name of letters, digits and any of _ . -")
    return name


def loading_choices() -> dict[str, tuple[str, ...]]:
    """What the options of loading a model may say, all but the device."""
    from llava.conversation import conv_templates

    return {
        "dtype": ("auto", "float32", "float16", "bfloat16"),
        "attn_implementation": ("sdpa", "eager", "flash_attention_2", "cpu_matmul"),
        "conv_template": tuple(conv_templates),
        "device_map": ("auto", "balanced", "balanced_low_0", "sequential"),
    }


def check_loading(device: str | None = None, **options: str | None) -> None:
    """See that a model can be loaded as wanted, on this machine, without loading anything.

    Raises
    ------
    ValueError
        If an option of `loading_choices`, or the device, cannot be.
    """
    choices = loading_choices()
    for option, value in options.items():
        if value is not None and value not in choices[option]:
            known = [one for one in choices[option] if one != "auto"]
            auto = "auto or " if len(known) < len(choices[option]) else ""
            close = hint(value, known)
            raise ValueError(f"{option}: got {shown(value)}{close}, expected {auto}one of {', '.join(known)}")
    if device and device != "cpu":
        _check_device(device)


def _check_device(device: str) -> None:
    kind = re.fullmatch(r"(mps)|cuda(?::([0-9]{1,3}))?", device)
    if not kind:
        raise ValueError(f"device: got {shown(device)}, expected cpu, cuda, cuda:1, ...")
    import torch

    count = torch.cuda.device_count()
    if not kind[1] and int(kind[2] or 0) >= count:
        raise ValueError(f"device: got {device!r}, but there are {count} CUDA devices")
    if kind[1] and not torch.backends.mps.is_available():
        raise ValueError(f"device: got {device!r}, but this machine has none")


def benchmarks(names: str | Sequence[str]) -> list[str]:
    """Names of benchmarks or of synthetic tasks, ``mini`` standing for the suite of the latter.

    Raises
    ------
    ValueError
        If a name is neither.
    """
    known = [*BENCHMARKS, *LOCAL, GROUP]
    found: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        if name not in known:
            raise ValueError(f"task: got {shown(name)}{hint(name, known)}, expected some of {', '.join(known)}")
        found.update(dict.fromkeys(SUITE if name == GROUP else [name]))
    return list(found)


def check_tasks(
    names: Sequence[str], model: str, limit: int | None, online: bool = True, skips: bool = False
) -> list[tuple[str, str]]:
    """Pairs of benchmark and lmms-eval task; the embedded model gets the synthetic tasks, each once.

    Without `online`, whether what they need from the internet is there is left open. With `skips`, some videos of a
    benchmark may be missing.

    Raises
    ------
    ValueError
        If a task cannot be run here.
    """
    pairs: dict[str, str] = {}
    for name in names:
        if name in LOCAL:
            task, benchmark = name, mirrored(name)
        else:
            task, benchmark = BENCHMARKS[name].mini if is_embedded(model) else BENCHMARKS[name].stock, name
            if online:
                _check_access(task)
        if limit and limit % TASKS[task].group:
            raise ValueError(f"LIMIT: got {limit}, but {task} scores questions by {TASKS[task].group}")
        if video_qa.is_of_files(task):
            video_qa.check(task, limit, skips)
        pairs.setdefault(task, benchmark)
    return [(benchmark, task) for task, benchmark in pairs.items()]


def retained_tokens(value: list[str] | str, shares: bool = True) -> list[int | float]:
    """Numbers of tokens from ``"192 128 64"``, or `shares` such as 0.111, with commas or as a list; each once."""
    words = (value if isinstance(value, str) else " ".join(map(str, value))).replace(",", " ").split()
    if not words:
        raise ValueError("RETAIN: got nothing, expected numbers of vision tokens such as 192 128 64")
    if len(words) > MANY:
        raise ValueError(f"RETAIN: got {len(words)} numbers, expected {MANY} at most")
    found = [share_of(word) if shares else None for word in words]
    pairs = zip(words, found, strict=True)
    return list(dict.fromkeys(whole_number("RETAIN", word) if share is None else share for word, share in pairs))


def _check_access(task: str) -> None:
    """See that what a task needs from the internet is there; without it, it would fail minutes later."""
    from huggingface_hub import constants, get_token

    if TASKS[task].gated and get_token() is None and not constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"task: lmms-eval downloads {task} with a Hugging Face token; run 'hf auth login' or set HF_TOKEN"
        )
    if TASKS[task].judge and not os.environ.get("OPENAI_API_KEY"):
        raise ValueError(f"task: a language model on the internet scores {task}; set OPENAI_API_KEY")
