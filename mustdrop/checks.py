"""Validation of settings: every error names the field, the value and what would be right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def require(holds: bool, field: str, value: Any, right: str) -> None:
    """Raise ValueError unless a condition holds."""
    if not holds:
        raise ValueError(f"{field} is {value!r}: it must be {right}")


def one_of(field: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    choices = tuple(choices)
    require(value in choices, field, value, "one of " + ", ".join(choices))
