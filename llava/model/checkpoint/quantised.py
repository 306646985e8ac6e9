"""Weights packed in 4 or 8 bits by bitsandbytes: which of them, and what may be asked for."""

from __future__ import annotations

import copy
import logging
from importlib.util import find_spec
from typing import Any

from transformers import BitsAndBytesConfig

from llava.model.checkpoint.describe import Checkpoint

PLAIN = ("lm_head", "model.mm_projector", "model.vision_tower")
"""Modules that stay as they are: they are small, or their inputs are cast to the dtype of their weights."""

_BITS = ("load_in_4bit", "load_in_8bit")


def need_bitsandbytes(field: str) -> None:
    """ValueError in the name of a field if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"{field}: quantised weights need bitsandbytes; pip install bitsandbytes")


def resolve_quantisation(checkpoint: Checkpoint, asked: Any) -> BitsAndBytesConfig | None:
    """How weights are to be packed on the way in; None if they stay as they are stored, packed or not.

    Raises
    ------
    ValueError
        If weights that are stored packed are asked for in another packing, or not with bitsandbytes.
    """
    if asked is not None and not isinstance(asked, BitsAndBytesConfig):
        raise ValueError(f"quantization_config: got {type(asked).__name__}, expected a BitsAndBytesConfig")
    if asked is None and not checkpoint.quantised:
        return None
    need_bitsandbytes("quantization_config")
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_once)
    if not checkpoint.quantised:
        asked = copy.deepcopy(asked)
        asked.llm_int8_skip_modules = sorted({*PLAIN, *(asked.llm_int8_skip_modules or [])})
        return asked
    stored = checkpoint.config.quantization_config
    if asked is not None and any(bool(getattr(asked, bits)) != bool(stored.get(bits)) for bits in _BITS):
        held = next(bits for bits in _BITS if stored.get(bits))
        raise ValueError(
            f"load_8bit, load_4bit: {checkpoint.path} is quantised already ({held}), it cannot be otherwise"
        )
    return None


class _Once(logging.Filter):
    """Lets every message through once: bitsandbytes says for each layer and token that 8 bits cast to float16."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        known = record.msg in self.said
        self.said.add(record.msg)
        return not known


_once = _Once()
