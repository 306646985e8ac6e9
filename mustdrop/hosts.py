"""Who gives hook points to models that have none of their own, such as transformers' classes as they are.

A package that hosts models names the module that does so as its `__mustdrop_hosts__`, which counts once the package has
been imported, or in an entry point of the group `mustdrop.hosts`, which counts where it is installed.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol

GROUP, ATTRIBUTE = "mustdrop.hosts", "__mustdrop_hosts__"


class Hosts(Protocol):
    """What a module offers that hosts models."""

    def hosts(self, model: object) -> bool:
        """Whether it gives hook points to a model."""

    def hosting(self, model: object) -> AbstractContextManager[Any]:
        """Give a model hook points for the length of a `with` block.

        The block's value has `hook_key`, `num_layers`, `num_vision_layers`, `config` and `check(reducer)`, which raises
        ValueError for what cannot be done on this model.
        """


def hosting_modules() -> list[Hosts]:
    """All modules that host models here and now."""
    packages = [package for name, package in list(sys.modules.items()) if "." not in name]
    named = [getattr(package, "__dict__", {}).get(ATTRIBUTE) for package in packages]
    return [import_module(name) for name in dict.fromkeys([*filter(None, named), *_installed()])]


def host_of(model: object) -> Hosts | None:
    """The module that hosts a model, None if there is none."""
    return next((module for module in hosting_modules() if module.hosts(model)), None)


@cache
def _installed() -> tuple[str, ...]:
    """The modules that installed distributions name."""
    return tuple(point.value for point in entry_points(group=GROUP))
