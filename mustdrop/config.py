"""From a YAML file or a dict to a reducer."""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mustdrop.compose import Compose
from mustdrop.hooks import Reducer
from mustdrop.registry import METHODS, available_methods


def load_reducer(source: str | Path | Mapping[str, Any]) -> Reducer:
    """Build a reducer from a YAML file or a mapping: `method` and that method's fields.

    Several methods at once: `{"method": "compose", "parts": [{"method": "mustdrop"}, "configs/methods/yopo_25.yaml"]}`.

    Raises
    ------
    ValueError
        With one line that names the field, the value and what would be right.
    """
    settings = dict(source) if isinstance(source, Mapping) else read_settings(Path(source))
    where = "" if isinstance(source, Mapping) else f"{source}: "
    name = settings.pop("method", None)
    if name == "compose":
        return _compose(where, **settings)
    if name not in METHODS:
        raise ValueError(f"{where}method is {name!r}: it must be one of {', '.join(available_methods())}{_hint(name)}")
    method = METHODS[name]
    types = typing.get_type_hints(method) if dataclasses.is_dataclass(method) else {}
    known = {field.name: types[field.name] for field in dataclasses.fields(method)} if types else {}
    for field, value in settings.items():
        if field not in known:
            fields = ", ".join(known) or "none"
            raise ValueError(f"{where}{field} is no field of {name}{_hint(field, known)}; its fields are: {fields}")
        if not _fits(value, known[field]):
            raise ValueError(f"{where}{field} is {value!r}: it must be of type {_type_name(known[field])}")
    try:
        return method(**settings)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def _compose(where: str, parts: Any = None, **others: Any) -> Compose:
    """The reducer made of the reducers in `parts`; positions are those of the first that has unusual ones."""
    if others or not isinstance(parts, (list, tuple)) or not parts:
        field, value = next(iter(others.items()), ("parts", parts))
        raise ValueError(f"{where}{field} is {value!r}: compose has one field, parts, a list of methods or their files")
    try:
        reducers = [load_reducer(part) for part in parts]
    except ValueError as error:
        raise ValueError(f"{where}parts: {error}") from None
    options = {
        option: next((wanted for part in reducers if (wanted := getattr(part, option)) != usual), usual)
        for option, usual in (("positions", Reducer.positions), ("decode_positions", Reducer.decode_positions))
    }
    return Compose(reducers, **options)


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a method's YAML file, unchecked but for being one; ValueError with one line otherwise.

    An array file (.npy) is looked for beside the YAML file first.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a method file is YAML with a field 'method'")
    try:
        settings = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: holds {type(settings).__name__}, it must be a mapping with a field 'method'")
    return _found(settings, path.parent)


def _found(settings: Any, folder: Path) -> Any:
    """Settings, also those of a composition's parts, with the array files that lie in a folder."""
    if isinstance(settings, dict):
        return {field: _found(value, folder) for field, value in settings.items()}
    if isinstance(settings, list):
        return [_found(value, folder) for value in settings]
    is_array = isinstance(settings, str) and settings.endswith(".npy") and (folder / settings).is_file()
    return os.path.relpath(folder / settings) if is_array else settings


def _hint(name: Any, known: typing.Iterable[str] = METHODS) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a YAML value can be what a field's annotation says."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is None:
        if annotation is float:
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        return isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))
    if isinstance(origin, type) and issubclass(origin, typing.Sequence):
        return isinstance(value, (list, tuple)) and all(_fits(item, arguments[0]) for item in value)
    return any(_fits(value, argument) for argument in arguments)


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return {"NoneType": "none", "str": "text", "int": "integer", "float": "number"}.get(
            annotation.__name__, annotation.__name__
        )
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    names = " or ".join(dict.fromkeys(_type_name(argument) for argument in arguments))
    return f"list of {names}" if isinstance(origin, type) and issubclass(origin, typing.Sequence) else names
