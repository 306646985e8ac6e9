"""Functions of modules replaced for a while, under whatever others have put around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

from torch import nn

_NOTHING = object()


@dataclass
class Replaced:
    """A module's forward, replaced until `undo`.

    Where accelerate has put hooks around it (models spread over devices, offloaded weights), what is inside of these is
    replaced. The new one is called with `arguments`, the stock forward, and what the module is called with; a copy of
    the module gets one that is bound to the copy.
    """

    module: nn.Module
    function: Callable[..., Any]
    arguments: tuple

    def __post_init__(self) -> None:
        self.name = "_old_forward" if "_old_forward" in vars(self.module) else "forward"
        self.before = vars(self.module).get(self.name, _NOTHING)
        stock = getattr(self.module, self.name)
        self.ours = update_wrapper(partial(self.function, *self.arguments, stock), stock)
        vars(self.module)[self.name] = self.ours

    def undo(self) -> None:
        """Put back what was there, unless somebody else has put something around ours."""
        if vars(self.module).get(self.name) is not self.ours:
            return
        if self.before is _NOTHING:
            del vars(self.module)[self.name]
        else:
            vars(self.module)[self.name] = self.before
