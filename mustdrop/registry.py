"""Names of methods."""

from __future__ import annotations

from mustdrop.hooks import Reducer
from mustdrop.mustdrop import MustDrop

METHODS: dict[str, type[Reducer]] = {
    "vanilla": Reducer,
    "mustdrop": MustDrop,
}


def available_methods() -> list[str]:
    """Names that `load_reducer` understands."""
    return sorted(METHODS)
