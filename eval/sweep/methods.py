"""What the entries of a sweep's ``methods`` mean on a model: settings at budgets, and what is out of reach."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from eval import checkpoints
from eval.methods import (
    VANILLA,
    check_shape,
    has_files,
    is_file,
    method_at,
    own_file,
    read_method,
    share_at,
)
from eval.run import settings
from eval.sweep.errors import naming, wrong
from mustdrop import available_methods, load_reducer
from mustdrop.calibrate import OutOfReach
from mustdrop.checks import shown
from mustdrop.command import share_of
from mustdrop.config import at_budget, budgets_of, read_settings
from mustdrop.shape import ModelShape


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


@dataclass(frozen=True)
class Budgets:
    """Numbers of tokens, or shares of an image's; with `of`, numbers are shares of so many."""

    retain: tuple[int | float, ...] = ()
    of: int | None = None


def methods_of(
    file: Path, given: object, checkpoint: dict, budgets: Budgets, views: Sequence[int]
) -> tuple[list[Method], list[LeftOut]]:
    """Every method at every budget for one model, each checked against the model's sizes, and what is out of reach."""
    model, found = checkpoint["model"], {}
    left_out: list[LeftOut] = []
    for entry in as_list(given):
        for method in _variants(file, entry, model, budgets):
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
            with naming(file, f"retain: {method.retain}" if method.retain in budgets.retain else "methods"):
                reasons = (out_of_reach(method, model, checkpoint["model_base"], count) for count in views)
                reason = next(filter(None, reasons), None)
            if reason is not None:
                left_out.append(LeftOut(model, method.method, method.retain, reason))
                del found[method.method, method.retain]
    return list(found.values()), left_out


def _variants(file: Path, entry: object, model: str, budgets: Budgets) -> Iterator[Method | LeftOut]:
    """What one entry of ``methods`` means.

    A name: the model's own file of this name, which has no budget, else every budget. A file: as it is, or every budget
    that it has settings for. Fields: every budget they leave open or list.
    """
    if isinstance(entry, Mapping):
        yield from _of_fields(file, dict(entry), model, budgets)
    elif not isinstance(entry, str):
        raise wrong(file, "methods", entry, "a method's name, the path of a YAML file, or a mapping {method: ...}")
    elif is_file(entry):
        yield from _of_file(file, entry, model, budgets)
    elif settings.NAME.fullmatch(entry):
        yield from _of_name(file, entry, model, budgets)
    else:
        raise wrong(file, "methods", entry, "a method's name or the path of a YAML file")


def _of_file(file: Path, entry: str, model: str, budgets: Budgets) -> Iterator[Method | LeftOut]:
    path = next((path for path in (Path(entry), checkpoints.ROOT / entry) if os.path.isfile(path)), Path(entry))
    with naming(file, "methods"):
        own = read_settings(path)
        stem = settings.check_name(f"the name of {shown(entry)}", path.stem)
    if "at" in own:
        yield from _calibrated(file, stem, own, model, budgets.retain)
        return
    with naming(file, "methods"):
        load_reducer(path)
    name, number = re.fullmatch(r"(.+?)(?:_([0-9]{1,6}|0\.[0-9]*[1-9][0-9]*))?", stem).groups()
    yield Method(name, None if number is None else _number(number), own)


def _of_name(file: Path, name: str, model: str, budgets: Budgets) -> Iterator[Method | LeftOut]:
    if own := own_file(model, name):
        with naming(file, "methods"):
            load_reducer(own)
            yield Method(name, None, read_method(str(own)))
        return
    if not (budgets.retain and has_files(name)):
        with naming(file, "methods"):
            load_reducer({"method": name})
    for number in budgets.retain if name != VANILLA else ():
        with naming(file, "retain"):
            yield _at_budget(model, name, number, budgets.of)
    if not budgets.retain:
        yield Method(name, None, {"method": name})


def _of_fields(file: Path, entry: dict, model: str, budgets: Budgets) -> Iterator[Method | LeftOut]:
    own = {key: value for key, value in entry.items() if key != "name"}
    name = entry.get("name", None if entry.get("method") == "compose" else entry.get("method"))
    listed = own.pop("retain") if isinstance(own.get("retain"), list) else None
    with naming(file, "methods"):
        reducer = None if "at" in own and "retain" not in own else load_reducer(own)
    if not isinstance(name, str) or not settings.NAME.fullmatch(name):
        raise wrong(file, "methods: name", name, "a name of letters, digits and any of _ . -")
    if name in available_methods() and own.get("method") != name:
        raise wrong(file, "methods: name", name, "another name than that of a method that it is not")
    if listed == []:
        raise wrong(file, "methods: retain", listed, "at least one number")
    if reducer is None:
        yield from _calibrated(file, name, own, model, budgets.retain if listed is None else listed)
        return
    works_to_a_number = hasattr(reducer, "retain") and not reducer.thresholds
    if listed is None and ("retain" in own or not budgets.retain or not works_to_a_number):
        yield Method(name, own.get("retain"), at_budget(own))
        return
    for number in budgets.retain if listed is None else listed:
        with naming(file, "methods"):
            load_reducer({**own, "retain": number})
        yield Method(name, number, {**own, "retain": share_at(number, budgets.of)})


def _calibrated(
    file: Path, name: str, own: dict, model: str, numbers: Sequence[int | float]
) -> Iterator[Method | LeftOut]:
    """Settings for several budgets at the wanted ones, or at all that there are."""
    with naming(file, "methods"):
        known = budgets_of(own)
    for number in numbers or map(_number, known):
        if str(number) not in known:
            have = ", ".join(known)
            yield LeftOut(model, name, number, f"no settings of {name} for {number} tokens, there are some for {have}")
            continue
        with naming(file, "methods"):
            found = at_budget({**own, "retain": number})
            load_reducer(found)
        yield Method(name, number, found)


def _number(budget: str) -> int | float:
    return share_of(budget) or int(budget)


def _at_budget(model: str, name: str, retain: int | float, of: int | None) -> Method | LeftOut:
    """A method at a budget, or why there is no such thing."""
    try:
        return Method(name, retain, method_at(model, name, retain, of=of)[0])
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


def as_list(value: object) -> list:
    """One thing or some, as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]
