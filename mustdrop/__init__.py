"""Fewer vision tokens, less computation per token: methods over one seam."""

from mustdrop.config import load_reducer
from mustdrop.hooks import Reducer, Run
from mustdrop.mustdrop import MustDrop
from mustdrop.registry import available_methods
from mustdrop.trace import Trace

__all__ = ["MustDrop", "Reducer", "Run", "Trace", "available_methods", "load_reducer"]
