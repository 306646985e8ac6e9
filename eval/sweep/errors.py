"""How a sweep says what is wrong in its file: the file, the key, the value and what would be right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mustdrop.checks import shown

OPTIONS = {"MODEL": "models", "MODEL_BASE": "models: model_base", "LIMIT": "limit", "RETAIN": "retain", "task": "tasks"}
"""How ``eval.run.settings`` and ``eval.methods`` call what keys are here."""


def wrong(file: Path, key: str, value: object, right: str) -> ValueError:
    """The error for a key of a file."""
    return ValueError(f"{file}: {key}: got {shown(value)}, expected {right}")


@contextmanager
def naming(file: Path, key: str) -> Iterator[None]:
    """Errors from inside get the file and the key in front; one that names an option gets the key that is its like."""
    try:
        yield
    except ValueError as error:
        option, _, text = str(error).partition(": ")
        named = f"{OPTIONS[option]}: {text}" if option in OPTIONS else f"{key}: {error}"
        raise ValueError(f"{file}: {named}") from None
