"""From a sweep's YAML file to its cells, with everything checked that can be checked before the first job."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eval import checkpoints
from eval.run import settings
from eval.run.cell import Cell, expand
from eval.sweep.errors import naming, wrong
from eval.sweep.launch import Launch
from eval.sweep.methods import Budgets, LeftOut, as_list, methods_of
from eval.tasks import BENCHMARKS, GROUP, LOCAL, TASKS
from llava.constants import PROTOCOLS
from mustdrop.checks import hint, shown
from mustdrop.command import LARGEST, whole_number
from mustdrop.read import read_yaml

KEYS = (
    "models", "tasks", "methods", "retain", "of", "seeds", "batch_size", "limit", "overrides", "launch", "unreachable",
)  # fmt: skip
"""What a sweep's file may say; `of`: the numbers of `retain` are shares of so many tokens, as of a canvas that an image
need not fill."""

MODEL_KEYS = ("model", *checkpoints.LOADING)
LARGEST_OF = 9_999  # shares are rounded to four digits
OVERRIDES = ("device", "device_map", "dtype", "attn_implementation", "conv_template")


@dataclass(frozen=True)
class Plan:
    """A checked sweep.

    Attributes
    ----------
    name : str
        The file's name.
    settings : dict
        What the file says, with the limit that is in force.
    cells : tuple of Cell
        Per model, task and seed: the untouched model, then every method at every budget.
    launch : Launch
        Where and how.
    left_out : tuple of LeftOut
        Methods at budgets that they cannot reach, where the file says ``unreachable: skip``.
    """

    name: str
    settings: dict
    cells: tuple[Cell, ...]
    launch: Launch
    left_out: tuple[LeftOut, ...] = ()


def read(
    file: Path,
    limit: str | int | None = None,
    where: str | None = None,
    online: bool = True,
    model: str | Mapping | None = None,
    skip_unfit: bool = False,
) -> Plan:
    """Read and check a sweep.

    Parameters
    ----------
    file : pathlib.Path
        YAML with some of the keys ``KEYS``.
    limit : str or int, optional
        Overrides the file's.
    where : {"local", "slurm"}, optional
        Overrides the file's.
    online : bool
        Whether to see that the hub has the models, and that there are tokens for what tasks download.
    model : str or mapping, optional
        Instead of the file's models, an entry as they are: a checkpoint, or a mapping with some of ``MODEL_KEYS``.
    skip_unfit : bool
        Whether questions that cannot be asked are skipped and counted.

    Raises
    ------
    ValueError
        With one line that names the file, the key, the value and what would be right.
    """
    given = {key: value for key, value in _mapping(file).items() if value is not None or key == "tasks"}
    of_file = _whole(file, "limit", given["limit"], 1) if "limit" in given else None
    limit = whole_number("LIMIT", limit) or of_file
    entries = _models(file, given.get("models", checkpoints.EMBEDDED) if model is None else model)
    seeds = _numbers(file, "seeds", given.get("seeds", 0), 0, settings.LARGEST_SEED)
    budgets = _budgets(file, given.get("retain", []), given.get("of"))
    batch_size = given.get("batch_size", settings.DEFAULT_BATCH_SIZE)
    batch_size = _whole(file, "batch_size", batch_size, 1, settings.LARGEST_BATCH)
    overrides = _overrides(file, given.get("overrides", {}))
    if given.get("unreachable", "stop") not in ("stop", "skip"):
        raise wrong(file, "unreachable", given["unreachable"], "skip or stop")
    if not isinstance(given.get("launch", {}), Mapping):
        raise wrong(file, "launch", given["launch"], "a mapping such as {where: local}")
    with naming(file, "launch"):
        launch = Launch.read(given.get("launch", {}), where)
    tasks = _tasks(file, given.get("tasks"))
    with naming(file, "models"):
        found = [checkpoints.check_checkpoint(**entry, online=online) for entry in entries]
    models = [one for number, one in enumerate(found) if one not in found[:number]]

    cells: list[Cell] = []
    left_out: list[LeftOut] = []
    for checkpoint in models:
        model = checkpoint["model"]
        with naming(file, "tasks"):
            pairs = settings.check_tasks(tasks, model, limit, online, skip_unfit)
        views = sorted({TASKS[task].views for _, task in pairs})
        methods, beyond = methods_of(file, given.get("methods", []), checkpoint, budgets, views)
        if beyond and given.get("unreachable") != "skip":
            raise ValueError(f"{file}: retain: {beyond[0].reason}")
        left_out += beyond
        common = {**checkpoint, "limit": limit, "batch_size": batch_size, "skip_unfit": skip_unfit, **overrides}
        cells += expand(common, pairs, seeds, list(map(vars, methods)))
    facts = {
        **given,
        "models": [entry if len(entry) > 1 else entry["model"] for entry in entries],
        "limit": limit,
        "left_out": list(map(str, left_out)),
    }
    return Plan(file.stem, facts, tuple(cells), launch, tuple(left_out))


def _mapping(file: Path) -> dict:
    if not os.path.exists(file):
        raise ValueError(f"{file}: no such file; a sweep is YAML, see configs/sweeps")
    given = read_yaml(file)
    if not isinstance(given, dict):
        raise ValueError(f"{file}: holds {type(given).__name__}, expected a mapping with some of {', '.join(KEYS)}")
    for key in given:
        if key not in KEYS:
            raise ValueError(f"{file}: unknown key {shown(key)}{hint(key, KEYS)}; a sweep has {', '.join(KEYS)}")
    return given


def _models(file: Path, given: object) -> list[dict]:
    """What `check_checkpoint` takes, for every entry of ``models``."""
    found = [{"model": entry} if isinstance(entry, str) else entry for entry in as_list(given)]
    for entry in found:
        if not isinstance(entry, Mapping):
            raise wrong(file, "models", given, "a list of names, or of mappings {model: ..., model_base: ...}")
        for key, value in entry.items():
            if key not in MODEL_KEYS:
                known = ", ".join(MODEL_KEYS)
                raise ValueError(f"{file}: models: unknown key {shown(key)}{hint(key, MODEL_KEYS)}; it has {known}")
            kind, right = (bool, "true or false") if key.startswith("load_") else (str, "a folder or a hub id")
            right = " or ".join(PROTOCOLS) if key == "protocol" else right
            if not isinstance(value, kind):
                raise wrong(file, f"models: {key}", value, right)
    if not found or not all(entry.get("model", "").strip() for entry in found):
        raise wrong(file, "models", given, "a list of names")
    return [dict(entry) for entry in found]


def _tasks(file: Path, given: object) -> list[str]:
    known = [*BENCHMARKS, *LOCAL, GROUP]
    names = _texts(file, "tasks", given)
    for name in names:
        if name not in known:
            raise ValueError(
                f"{file}: tasks: got {shown(name)}{hint(name, known)}, expected some of {', '.join(known)} "
                f"({GROUP}: those that stand in for benchmarks)"
            )
    return settings.benchmarks(names)


def _overrides(file: Path, given: object) -> dict:
    """Settings of every cell that have no key of their own."""
    if not isinstance(given, Mapping):
        raise wrong(file, "overrides", given, "a mapping such as {dtype: bfloat16}")
    choices = settings.loading_choices()
    for key, value in given.items():
        if key not in OVERRIDES:
            raise ValueError(
                f"{file}: overrides: unknown key {shown(key)}{hint(key, OVERRIDES)}; it has {', '.join(OVERRIDES)}"
            )
        if value not in choices.get(key, (value,)):
            raise wrong(file, f"overrides: {key}", value, "one of " + ", ".join(choices[key]))
        if not isinstance(value, str):
            raise wrong(file, f"overrides: {key}", value, "text")
        if key == "device" and value not in ("cpu", "cuda", "mps"):
            raise wrong(file, "overrides: device", value, "cpu, cuda or mps; which GPU a job gets is up to launch")
    return dict(given)


def _texts(file: Path, key: str, value: object) -> list[str]:
    values = as_list(value)
    if not values or not all(isinstance(one, str) and one.strip() for one in values):
        raise wrong(file, key, value, "a list of names")
    return values


def _numbers(file: Path, key: str, value: object, least: int, most: int = LARGEST) -> list[int]:
    """One number or some, each once."""
    if not 0 < len(as_list(value)) <= settings.MANY:
        raise wrong(file, key, value, f"1 to {settings.MANY} numbers")
    return list(dict.fromkeys(_whole(file, key, one, least, most) for one in as_list(value)))


def _budgets(file: Path, value: object, of: object) -> Budgets:
    """Numbers of tokens, or shares of an image's, each once; none for an empty list."""
    given = as_list(value)
    shares = [isinstance(one, float) and 0 < one <= 1 for one in given]
    counts = [one for one, is_share in zip(given, shares, strict=True) if not is_share]
    if counts:
        _numbers(file, "retain", counts, 1)
    if of is not None:
        _whole(file, "of", of, max([one for one in counts if isinstance(one, int)], default=1), LARGEST_OF)
    return Budgets(tuple({repr(one): one for one in given}.values()), of)


def _whole(file: Path, key: str, value: object, least: int, most: int = LARGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise wrong(file, key, value, f"a whole number of {least} or more, {most} at most")
    return value
