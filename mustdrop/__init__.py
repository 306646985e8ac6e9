"""Fewer vision tokens, less computation per token: methods over one set of hooks."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mustdrop.config import load_reducer
    from mustdrop.hooks import Reducer
    from mustdrop.mustdrop import MustDrop
    from mustdrop.mustdrop_plus import MustDropPlus
    from mustdrop.recording import TraceRecorder
    from mustdrop.registry import available_methods
    from mustdrop.trace import Trace

__all__ = ["MustDrop", "MustDropPlus", "Reducer", "TraceRecorder", "Trace", "available_methods", "load_reducer"]
_HOMES = {
    "MustDrop": "mustdrop",
    "MustDropPlus": "mustdrop_plus",
    "Reducer": "hooks",
    "TraceRecorder": "recording",
    "Trace": "trace",
    "available_methods": "registry",
    "load_reducer": "config",
}


def __getattr__(name: str) -> object:
    """A public name from its module: reading and checking files must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
