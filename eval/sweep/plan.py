"""From a sweep's YAML file to its cells, with everything checked that can be checked before the first job."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from eval import checkpoints
from eval.methods import VANILLA, check_shape, has_files, method_at, own_file, read_method
from eval.run import settings
from eval.run.cell import Cell
from eval.sweep.launch import Launch
from eval.tasks import BENCHMARKS, GROUP, LOCAL, TASKS
from llava.constants import PROTOCOLS
from mustdrop import available_methods, load_reducer
from mustdrop.calibrate import OutOfReach
from mustdrop.checks import hint, shown
from mustdrop.command import LARGEST, share_of, whole_number
from mustdrop.read import read_yaml
from mustdrop.shape import ModelShape

KEYS = ("models", "tasks", "methods", "retain", "seeds", "batch_size", "limit", "overrides", "launch", "unreachable")
MODEL_KEYS = ("model", *checkpoints.LOADING)
OPTIONS = {"MODEL": "models", "MODEL_BASE": "models: model_base", "LIMIT": "limit", "RETAIN": "retain", "task": "tasks"}
"""How ``eval.run.settings`` and ``eval.methods`` call what keys are here."""

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


@dataclass(frozen=True)
class LeftOut:
    """A method at a budget that it cannot reach on a model, and why."""

    model: str
    method: str
    retain: int | float
    reason: str

    def __str__(self) -> str:
        return f"left out: {self.reason}"


@dataclass(frozen=True)
class Method:
    """What tells a method's cells from others; the fields are those of `Cell`."""

    method: str
    retain: int | float | None
    settings: dict


UNTOUCHED = Method(VANILLA, None, {"method": VANILLA})


def read(
    file: Path,
    limit: str | int | None = None,
    where: str | None = None,
    online: bool = True,
    model: str | Mapping | None = None,
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
    retain = _budgets(file, given["retain"]) if given.get("retain", []) != [] else []
    batch_size = given.get("batch_size", settings.DEFAULT_BATCH_SIZE)
    batch_size = _whole(file, "batch_size", batch_size, 1, settings.LARGEST_BATCH)
    overrides = _overrides(file, given.get("overrides", {}))
    if given.get("unreachable", "stop") not in ("stop", "skip"):
        raise _wrong(file, "unreachable", given["unreachable"], "skip or stop")
    if not isinstance(given.get("launch", {}), Mapping):
        raise _wrong(file, "launch", given["launch"], "a mapping such as {where: local}")
    with _naming(file, "launch"):
        launch = Launch.read(given.get("launch", {}), where)
    tasks = _tasks(file, given.get("tasks"))
    with _naming(file, "models"):
        found = [checkpoints.check_checkpoint(**entry, online=online) for entry in entries]
    models = [one for number, one in enumerate(found) if one not in found[:number]]

    cells: list[Cell] = []
    left_out: list[LeftOut] = []
    for checkpoint in models:
        model = checkpoint["model"]
        with _naming(file, "tasks"):
            pairs = settings.check_tasks(tasks, model, limit, online)
        views = sorted({TASKS[task].views for _, task in pairs})
        methods, beyond = _methods(file, given.get("methods", []), checkpoint, retain, views)
        if beyond and given.get("unreachable") != "skip":
            raise ValueError(f"{file}: retain: {beyond[0].reason}")
        left_out += beyond
        common = {**checkpoint, "limit": limit, "batch_size": batch_size, **overrides}
        cells += [
            Cell(**common, benchmark=benchmark, task=task, seed=seed, **vars(method))
            for benchmark, task in pairs
            for seed in seeds
            for method in (UNTOUCHED, *methods)
        ]
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
    found = [{"model": entry} if isinstance(entry, str) else entry for entry in _list(given)]
    for entry in found:
        if not isinstance(entry, Mapping):
            raise _wrong(file, "models", given, "a list of names, or of mappings {model: ..., model_base: ...}")
        for key, value in entry.items():
            if key not in MODEL_KEYS:
                known = ", ".join(MODEL_KEYS)
                raise ValueError(f"{file}: models: unknown key {shown(key)}{hint(key, MODEL_KEYS)}; it has {known}")
            kind, right = (bool, "true or false") if key.startswith("load_") else (str, "a folder or a hub id")
            right = " or ".join(PROTOCOLS) if key == "protocol" else right
            if not isinstance(value, kind):
                raise _wrong(file, f"models: {key}", value, right)
    if not found or not all(entry.get("model", "").strip() for entry in found):
        raise _wrong(file, "models", given, "a list of names")
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
        raise _wrong(file, "overrides", given, "a mapping such as {dtype: bfloat16}")
    choices = settings.loading_choices()
    for key, value in given.items():
        if key not in OVERRIDES:
            raise ValueError(
                f"{file}: overrides: unknown key {shown(key)}{hint(key, OVERRIDES)}; it has {', '.join(OVERRIDES)}"
            )
        if value not in choices.get(key, (value,)):
            raise _wrong(file, f"overrides: {key}", value, "one of " + ", ".join(choices[key]))
        if not isinstance(value, str):
            raise _wrong(file, f"overrides: {key}", value, "text")
        if key == "device" and value not in ("cpu", "cuda", "mps"):
            raise _wrong(file, "overrides: device", value, "cpu, cuda or mps; which GPU a job gets is up to launch")
    return dict(given)


def _methods(
    file: Path, given: object, checkpoint: dict, retain: Sequence[int | float], views: Sequence[int]
) -> tuple[list[Method], list[LeftOut]]:
    """Every method at every budget for one model, each checked against the model's sizes, and what is out of reach."""
    model, found = checkpoint["model"], {}
    left_out: list[LeftOut] = []
    for entry in _list(given):
        for method in _variants(file, entry, model, retain):
            if isinstance(method, LeftOut):
                left_out.append(method)
                continue
            if method.settings["method"] == VANILLA:
                continue
            known = found.setdefault((method.method, method.retain), method)
            if known.settings != method.settings:
                raise ValueError(
                    f"{file}: methods: two different ones are called {method.method!r}; give one of them "
                    "another name, {name: ..., method: ..., ...}"
                )
            with _naming(file, f"retain: {method.retain}" if method.retain in retain else "methods"):
                reasons = (out_of_reach(method, model, checkpoint["model_base"], count) for count in views)
                reason = next(filter(None, reasons), None)
            if reason is not None:
                left_out.append(LeftOut(model, method.method, method.retain, reason))
                del found[method.method, method.retain]
    return list(found.values()), left_out


def _variants(file: Path, entry: object, model: str, retain: Sequence[int | float]) -> Iterator[Method | LeftOut]:
    """What one entry of ``methods`` means.

    A name: the model's own file of this name, which has no budget, else every budget. A file: as it is. Fields: every
    budget they leave open or list.
    """
    is_file = isinstance(entry, str) and Path(entry).suffix in (".yaml", ".yml")
    if isinstance(entry, str) and not is_file and not settings.NAME.fullmatch(entry):
        raise _wrong(file, "methods", entry, "a method's name or the path of a YAML file")
    if is_file:
        path = next((path for path in (Path(entry), checkpoints.ROOT / entry) if os.path.isfile(path)), Path(entry))
        with _naming(file, "methods"):
            own = read_method(str(path))
            load_reducer(own)
        with _naming(file, "methods"):
            stem = settings.check_name(f"the name of {shown(entry)}", path.stem)
        name, number = re.fullmatch(r"(.+?)(?:_([0-9]{1,6}|0\.[0-9]*[1-9][0-9]*))?", stem).groups()
        yield Method(name, None if number is None else share_of(number) or int(number), own)
    elif isinstance(entry, str) and own_file(model, entry):
        with _naming(file, "methods"):
            own = read_method(str(own_file(model, entry)))
            load_reducer(own)
        yield Method(entry, None, own)
    elif isinstance(entry, str):
        if not (retain and has_files(entry)):
            with _naming(file, "methods"):
                load_reducer({"method": entry})
        for number in retain if entry != VANILLA else ():
            with _naming(file, "retain"):
                yield _at_budget(model, entry, number)
        if not retain:
            yield Method(entry, None, {"method": entry})
    elif isinstance(entry, Mapping):
        own = {key: value for key, value in entry.items() if key != "name"}
        name = entry.get("name", None if entry.get("method") == "compose" else entry.get("method"))
        budgets = own.pop("retain") if isinstance(own.get("retain"), list) else None
        with _naming(file, "methods"):
            reducer = load_reducer(own)
        if not isinstance(name, str) or not settings.NAME.fullmatch(name):
            raise _wrong(file, "methods: name", name, "a name of letters, digits and any of _ . -")
        if name in available_methods() and own.get("method") != name:
            raise _wrong(file, "methods: name", name, "another name than that of a method that it is not")
        if budgets == []:
            raise _wrong(file, "methods: retain", budgets, "at least one number")
        if budgets is None and (not retain or "retain" in own or not hasattr(reducer, "retain") or reducer.thresholds):
            yield Method(name, own.get("retain"), own)
            return
        for number in retain if budgets is None else budgets:
            with _naming(file, "methods"):
                load_reducer({**own, "retain": number})
            yield Method(name, number, {**own, "retain": number})
    else:
        raise _wrong(file, "methods", entry, "a method's name, the path of a YAML file, or a mapping {method: ...}")


def _at_budget(model: str, name: str, retain: int | float) -> Method | LeftOut:
    """A method at a budget, or why there is no such thing."""
    try:
        return Method(name, retain, method_at(model, name, retain)[0])
    except OutOfReach as error:
        return LeftOut(model, name, retain, str(error).removeprefix("RETAIN: "))


def out_of_reach(method: Method, model: str, model_base: str | None = None, views: int = 1) -> str | None:
    """Why a reducer cannot keep the wanted number of tokens of images of so many views on a model, None if it can.

    What depends on data shows later.

    Raises
    ------
    ValueError
        If something else does not fit the model.
    """
    shape = shape_of(model, model_base)
    if shape is None:
        return None
    name = Path(model).name
    most = views * (shape.vision_tokens if shape.tiles is None else shape.image().tokens)
    if method.retain is not None and method.retain > most:
        raise ValueError(f"{name} has only {most} vision tokens per image")
    reducer = load_reducer(method.settings)
    try:
        reducer.check(shape.layers, shape.vision_layers + 1)
    except ValueError as error:
        raise ValueError(f"{method.method} on {name}: {error}") from None
    try:
        check_shape(reducer, shape, views)
    except ValueError as error:
        if method.retain is None:
            raise ValueError(f"{method.method} on {name}: {error}") from None
        return f"{method.method} on {name}: {error}"
    return None


@cache
def shape_of(model: str, model_base: str | None = None) -> ModelShape | None:
    """A model's sizes from its config.json, or its base's, None where it cannot be had or read."""
    from huggingface_hub import hf_hub_download

    model = checkpoints.config_folder(model, model_base)
    try:
        return ModelShape.from_config(model if Path(model).is_dir() else hf_hub_download(model, "config.json"))
    except (ValueError, OSError):
        return None


def _list(value: object) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _texts(file: Path, key: str, value: object) -> list[str]:
    values = _list(value)
    if not values or not all(isinstance(one, str) and one.strip() for one in values):
        raise _wrong(file, key, value, "a list of names")
    return values


def _numbers(file: Path, key: str, value: object, least: int, most: int = LARGEST) -> list[int]:
    """One number or some, each once."""
    if not 0 < len(_list(value)) <= settings.MANY:
        raise _wrong(file, key, value, f"1 to {settings.MANY} numbers")
    return list(dict.fromkeys(_whole(file, key, one, least, most) for one in _list(value)))


def _budgets(file: Path, value: object) -> list[int | float]:
    """Numbers of tokens, or shares of an image's, each once."""
    given = _list(value)
    shares = [isinstance(one, float) and 0 < one <= 1 for one in given]
    counts = [one for one, is_share in zip(given, shares, strict=True) if not is_share]
    if counts or not given:
        _numbers(file, "retain", counts, 1)
    return list({repr(one): one for one in given}.values())


def _whole(file: Path, key: str, value: object, least: int, most: int = LARGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _wrong(file, key, value, f"a whole number of {least} or more, {most} at most")
    return value


def _wrong(file: Path, key: str, value: object, right: str) -> ValueError:
    return ValueError(f"{file}: {key}: got {shown(value)}, expected {right}")


@contextmanager
def _naming(file: Path, key: str) -> Iterator[None]:
    """Errors from inside get the file and the key in front; one that names an option gets the key that is its like."""
    try:
        yield
    except ValueError as error:
        option, _, text = str(error).partition(": ")
        named = f"{OPTIONS[option]}: {text}" if option in OPTIONS else f"{key}: {error}"
        raise ValueError(f"{file}: {named}") from None
