"""From a YAML file or a dict to a reducer."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mustdrop.checks import fits_type, hint, require, shown, type_name
from mustdrop.compose import Compose
from mustdrop.hooks import Reducer
from mustdrop.read import parse_yaml, read_yaml
from mustdrop.registry import METHODS, available_methods
from mustdrop.retain import check_retain

DEEPEST = 5  # compositions inside each other; a file that names itself would have no end


def load_reducer(source: str | Path | Mapping[str, Any], retain: int | float | None = None) -> Reducer:
    """Build a reducer from a YAML file or a mapping: `method` and that method's fields.

    Where the fields differ from budget to budget, `at` holds them and `retain` says which:
    `{"method": "mustdrop", "at": {64: {...}, 128: {...}}, "retain": 64}`. Several methods at once:
    `{"method": "compose", "parts": [{"method": "mustdrop"}, "configs/methods/yopo_25.yaml"]}`.

    Parameters
    ----------
    source : str, Path or mapping
        The file or the settings.
    retain : int or float, optional
        Vision tokens to keep, or a share of an image's: the field `retain`, whatever the source says of it.

    Raises
    ------
    ValueError
        With one line that names the field, the value and what would be right.
    """
    return _load(source, DEEPEST, retain)


def _load(source: Any, depth: int, retain: int | float | None = None) -> Reducer:
    settings = _settings_of(source)
    if retain is not None:
        settings["retain"] = retain
    try:
        return _build(at_budget(settings), depth)
    except ValueError as error:
        where = "" if isinstance(source, Mapping) else f"{source}: "
        raise ValueError(f"{where}{error}") from None


def _settings_of(source: Any) -> dict[str, Any]:
    """The settings that a mapping or a file holds, unchecked."""
    if isinstance(source, Mapping):
        return dict(source)
    if not isinstance(source, (str, Path)) or not str(source):
        raise ValueError(f"got {shown(source)}: it must be a mapping with a field 'method' or the path of its file")
    return read_settings(Path(source))


def at_budget(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without `at`: the fields that it holds for the budget `retain` are among them instead.

    Raises
    ------
    ValueError
        If `at` has no such budget, or cannot be read.
    """
    if "at" not in settings:
        return dict(settings)
    common = {field: value for field, value in settings.items() if field not in ("at", "retain")}
    wanted, budgets = settings.get("retain"), budgets_of(settings)
    own = budgets.get(str(wanted)) if fits_type(wanted, int | float) else None
    require(own is not None, "retain", wanted, f"one of {', '.join(budgets)}, the budgets that there are settings for")
    twice = next((field for field in own if field in common), None)
    require(twice is None, "at", settings["at"], f"without {twice}, which is said for all budgets")
    return common | own


def budgets_of(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `at` holds: budget, as text -> fields; empty where settings have no `at`."""
    given = settings.get("at", {})
    right = "a mapping from numbers of tokens, or shares, to fields"
    require(isinstance(given, Mapping) and (given or "at" not in settings), "at", given, right)
    found: dict[str, dict[str, Any]] = {}
    for key, fields in given.items():
        budget = parse_yaml(key) if isinstance(key, str) else key
        require(fits_type(budget, int | float) and isinstance(fields, Mapping), "at", {key: fields}, right)
        check_retain(budget, field="at")
        require(str(budget) not in found, "at", key, "there only once")
        found[str(budget)] = dict(fields)
    return found


def _build(settings: dict[str, Any], depth: int) -> Reducer:
    name = settings.pop("method", None)
    if name == "compose":
        return _compose(settings, depth)
    right = f"one of {', '.join(available_methods())}{hint(name, METHODS)}"
    require(isinstance(name, str) and name in METHODS, "method", name, right)
    known = fields_of(METHODS[name])
    for field, value in settings.items():
        if field not in known:
            raise ValueError(
                f"{field if isinstance(field, str) else shown(field)} is no field of {name}{hint(field, known)}; "
                f"its fields are: {', '.join(known) or 'none'}"
            )
        require(fits_type(value, known[field]), field, value, f"of type {type_name(known[field])}")
    return METHODS[name](**settings)


def fields_of(method: type[Reducer]) -> dict[str, Any]:
    """The fields of a method's settings, with their types."""
    if not dataclasses.is_dataclass(method):
        return {}
    types = typing.get_type_hints(method)
    return {field.name: types[field.name] for field in dataclasses.fields(method)}


def _compose(settings: dict[str, Any], depth: int) -> Compose:
    """The reducer made of the reducers in `parts`; positions are those of the first that has unusual ones.

    A budget goes to the parts whose settings depend on one.
    """
    parts = settings.get("parts")
    given = parts if isinstance(parts, (list, tuple)) else ()
    if depth == 0:
        raise ValueError(f"compositions inside compositions, more than {DEEPEST}; a file may not name itself")
    try:
        asking = ["at" in _settings_of(part) for part in given]
    except ValueError as error:
        raise ValueError(f"parts: {error}") from None
    known = {"parts", "retain"} if any(asking) else {"parts"}
    if not given or not settings.keys() <= known:
        field, value = next((item for item in settings.items() if item[0] not in known), ("parts", parts))
        raise ValueError(f"{field} is {shown(value)}: compose has one field, parts, a list of methods or their files")
    try:
        budgets = [settings.get("retain") if asks else None for asks in asking]
        reducers = [_load(part, depth - 1, budget) for part, budget in zip(given, budgets, strict=True)]
    except ValueError as error:
        raise ValueError(f"parts: {error}") from None
    options = {
        option: next((wanted for part in reducers if (wanted := getattr(part, option)) != usual), usual)
        for option, usual in (("positions", Reducer.positions), ("decode_positions", Reducer.decode_positions))
    }
    return Compose(reducers, **options)


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a method's YAML file, unchecked but for being one; ValueError with one line otherwise.

    An array file (.npy) is looked for beside the YAML file first. Where there is no NAME_64.yaml, that is NAME.yaml at
    `retain` 64.
    """
    if not os.path.exists(path):
        if (single := _one_budget(path)) is not None:
            return single
        raise ValueError(f"{path}: no such file; a method file is YAML with a field 'method'{_no_file_needed(path)}")
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: holds {type(settings).__name__}, it must be a mapping with a field 'method'")
    return _found(settings, path.parent)


def _one_budget(path: Path) -> dict[str, Any] | None:
    """What NAME.yaml holds for the budget in the name of a file NAME_BUDGET.yaml that is not there."""
    name, _, budget = path.stem.rpartition("_")
    whole = path.with_name(f"{name}{path.suffix}")
    if not name or not os.path.isfile(whole):
        return None
    settings = read_settings(whole)
    own = {**settings, "retain": parse_yaml(budget)} if budget in budgets_of(settings) else None
    return None if own is None else at_budget(own)


def _no_file_needed(path: Path) -> str:
    name, _, budget = path.stem.rpartition("_")
    needless = name in METHODS and budget.isdecimal()
    return f"; none is needed for {{method: {name}, retain: {budget}}}" if needless else ""


def _found(settings: Any, folder: Path) -> Any:
    """Settings, also those of a composition's parts, with the array files that lie in a folder."""
    if isinstance(settings, dict):
        return {field: _found(value, folder) for field, value in settings.items()}
    if isinstance(settings, list):
        return [_found(value, folder) for value in settings]
    is_array = isinstance(settings, str) and settings.endswith(".npy") and os.path.isfile(folder / settings)
    return os.path.relpath(folder / settings) if is_array else settings
