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
from mustdrop.read import read_yaml
from mustdrop.registry import METHODS, available_methods

DEEPEST = 5  # compositions inside each other; a file that names itself would have no end


def load_reducer(source: str | Path | Mapping[str, Any]) -> Reducer:
    """Build a reducer from a YAML file or a mapping: `method` and that method's fields.

    Several methods at once: `{"method": "compose", "parts": [{"method": "mustdrop"}, "configs/methods/yopo_25.yaml"]}`.

    Raises
    ------
    ValueError
        With one line that names the field, the value and what would be right.
    """
    return _load(source, DEEPEST)


def _load(source: Any, depth: int) -> Reducer:
    if isinstance(source, Mapping):
        return _build(dict(source), depth)
    if not isinstance(source, (str, Path)) or not str(source):
        raise ValueError(f"got {shown(source)}: it must be a mapping with a field 'method' or the path of its file")
    settings = read_settings(Path(source))
    try:
        return _build(settings, depth)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


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
    """The reducer made of the reducers in `parts`; positions are those of the first that has unusual ones."""
    parts = settings.get("parts")
    if settings.keys() != {"parts"} or not isinstance(parts, (list, tuple)) or not parts:
        field, value = next((item for item in settings.items() if item[0] != "parts"), ("parts", parts))
        raise ValueError(f"{field} is {shown(value)}: compose has one field, parts, a list of methods or their files")
    if depth == 0:
        raise ValueError(f"compositions inside compositions, more than {DEEPEST}; a file may not name itself")
    try:
        reducers = [_load(part, depth - 1) for part in parts]
    except ValueError as error:
        raise ValueError(f"parts: {error}") from None
    options = {
        option: next((wanted for part in reducers if (wanted := getattr(part, option)) != usual), usual)
        for option, usual in (("positions", Reducer.positions), ("decode_positions", Reducer.decode_positions))
    }
    return Compose(reducers, **options)


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a method's YAML file, unchecked but for being one; ValueError with one line otherwise.

    An array file (.npy) is looked for beside the YAML file first.
    """
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file; a method file is YAML with a field 'method'")
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: holds {type(settings).__name__}, it must be a mapping with a field 'method'")
    return _found(settings, path.parent)


def _found(settings: Any, folder: Path) -> Any:
    """Settings, also those of a composition's parts, with the array files that lie in a folder."""
    if isinstance(settings, dict):
        return {field: _found(value, folder) for field, value in settings.items()}
    if isinstance(settings, list):
        return [_found(value, folder) for value in settings]
    is_array = isinstance(settings, str) and settings.endswith(".npy") and os.path.isfile(folder / settings)
    return os.path.relpath(folder / settings) if is_array else settings
