"""Who gives hook points to models that have none of their own, such as transformers' classes as they are."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol

GROUP = "mustdrop.hosts"
"""Entry points of this group name modules that host models."""

_modules: dict[str, None] = {}


class Hosts(Protocol):
    """What a module offers that hosts models."""

    def hosts(self, model: object) -> bool:
        """Whether it gives hook points to a model."""

    def hosting(self, model: object) -> AbstractContextManager[Any]:
        """Give a model hook points for the length of a `with` block.

        The block's value has `hook_key`, `num_layers`, `num_vision_layers`, `config` and `check(reducer)`, which raises
        ValueError for what cannot be done on this model.
        """


def register_hosts(module: str) -> None:
    """Name a module that hosts models; it is imported when a model without hook points is met."""
    _modules.setdefault(module)


def host_of(model: object) -> Hosts | None:
    """The module that hosts a model, None if there is none."""
    found = (import_module(name) for name in [*_modules, *_installed()])
    return next((module for module in found if module.hosts(model)), None)


@cache
def _installed() -> tuple[str, ...]:
    """The modules that installed distributions name."""
    return tuple(point.value for point in entry_points(group=GROUP) if point.value not in _modules)
