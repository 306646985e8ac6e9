"""Validation of settings: every error names the field, the value and what would be right."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

LONGEST = 80  # characters of a value that an error repeats
LARGEST = 1 << 63  # what integers stay below


def shown(value: Any) -> str:
    """A value as an error repeats it: on one line, and not all of it where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def require(holds: bool, field: str, value: Any, right: str) -> None:
    """Raise ValueError unless a condition holds."""
    if not holds:
        raise ValueError(f"{field} is {shown(value)}: it must be {right}")


def one_of(field: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    choices = tuple(choices)
    require(isinstance(value, str) and value in choices, field, value, "one of " + ", ".join(choices))


def hint(name: Any, known: Iterable[str]) -> str:
    """``(did you mean ...?)`` if something known is close."""
    close = difflib.get_close_matches(str(name)[:LONGEST], list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def check_layers(field: str, given: Sequence[int | float], layers: int, least: int = 0) -> list[int]:
    """The numbers of decoder layers that are given as numbers or as fractions of the depth.

    Parameters
    ----------
    field : str
        Name for errors.
    given : sequence of int or float
        Floats are fractions.
    layers : int
        Depth of the decoder.
    least : int
        First layer there can be; a fraction below it means it.

    Raises
    ------
    ValueError
        Unless every one is a layer, and they rise, each a layer of its own.
    """
    below = "from 0 to below 1" if least == 0 else "between 0 and 1"
    for layer in given:
        fraction = isinstance(layer, float)
        fits = 0 <= layer < 1 and (layer > 0 or least == 0) if fraction else least <= layer < layers
        require(fits, field, layer, f"a layer from {least} to {layers - 1} or a fraction {below}")
    numbers = [max(least, int(layer * layers)) if isinstance(layer, float) else layer for layer in given]
    rising = all(now < then for now, then in pairwise(numbers))
    require(rising, field, list(given), f"rising, each a layer of its own; of {layers} they are {numbers}")
    return numbers


def fits_type(value: Any, annotation: Any) -> bool:
    """Whether a value can be what an annotation says: a bool is no number, and a number is finite."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits_type(value, argument) for argument in arguments)
    if origin is not None:
        return isinstance(value, (list, tuple)) and all(fits_type(item, arguments[0]) for item in value)
    if annotation is float and isinstance(value, float):
        return math.isfinite(value)
    if annotation in (int, float):
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST
    return isinstance(value, annotation)


def type_name(annotation: Any) -> str:
    """An annotation in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is None:
        names = {"NoneType": "none", "str": "text", "int": "integer", "float": "number", "bool": "true or false"}
        return names.get(annotation.__name__, annotation.__name__)
    names = " or ".join(dict.fromkeys(type_name(argument) for argument in arguments))
    return names if origin in (typing.Union, types.UnionType) else f"list of {names}"
