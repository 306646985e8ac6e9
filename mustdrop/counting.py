"""Multiply-adds of the matrix products inside a `with` block, by torch's own counter."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

PACKED = ("int8_linear_matmul", "int8_scaled_mm", "int8_mixed_scaled_mm", "gemv_4bit", "gemm_4bit")
"""Products of bitsandbytes with packed weights, which torch's counter does not know."""


@dataclass
class Products:
    """Multiply-adds, known when the block has ended."""

    macs: int = 0


@contextmanager
def counted_products() -> Iterator[Products]:
    """Count the matrix products that are computed inside, compiled functions apart; counters may lie in each other."""
    counted = Products()
    with FlopCounterMode(display=False, custom_mapping=_packed()) as counter:
        yield counted
    counted.macs = counter.get_total_flops() // 2


def _packed() -> dict[object, Callable[..., int]]:
    if "bitsandbytes" not in sys.modules:
        return {}
    library = torch.ops.bitsandbytes
    return {getattr(library, name): _flops for name in PACKED if hasattr(library, name)}


def _flops(rows: Sequence[int], *_: object, out_shape: Sequence, **__: object) -> int:
    """Of a product of `rows` `[..., width]` with a packed matrix; some answer with more than the result."""
    result = out_shape[0] if out_shape and not isinstance(out_shape[0], int) else out_shape
    return 2 * math.prod(result) * rows[-1]
