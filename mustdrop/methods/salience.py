"""What methods share that choose by the attention which a vision encoder pays its patches."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mustdrop.hooks import Attention, Keep, VisionStep, VisionTokens
from mustdrop.methods.retaining import Retaining
from mustdrop.reach import Touch, Tower


def paid(attention: Attention, tokens: VisionTokens, by_all: bool = False) -> Tensor:
    """Attention that CLS pays each token, mean over heads, float32 `[rows, tokens]`.

    Of an encoder without CLS, or with `by_all`, what all its tokens pay it on average.
    """
    length, prefix = tokens.hidden.shape[1], tokens.prefix
    rows = torch.arange(length if by_all or not prefix else 1, device=tokens.device)
    probabilities = attention.mean_over_heads(rows.expand(len(tokens.patch_index), -1))
    if tokens.valid is None or len(rows) == 1:
        return probabilities.mean(1)[:, prefix:]
    real = tokens.valid_with_prefix.to(probabilities.dtype)
    return (real[:, None] @ probabilities)[:, 0, prefix:] / real.sum(-1, keepdim=True)


class InTower(Retaining):
    """Base of methods that choose on the output of the last block that is run, by its attention."""

    counts_at: ClassVar[str] = "after_vision_block"

    def touches(self, tower: Tower) -> Touch:
        here = frozenset({tower.last})
        return Touch(changes=here, reads=here)


class AfterTower(Retaining):
    """Base of methods that choose after the projector, by what CLS paid each patch in the last block that is run."""

    def touches(self, tower: Tower) -> Touch:
        return Touch(reads=frozenset({tower.last}))

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        return Keep.note(cls_attention=paid(step.attention, step.tokens)) if step.last else None


def stretched(score: Tensor, valid: Tensor | None = None) -> Tensor:
    """A score `[rows, tokens]` stretched from 0 to 1 in every row; 1 if all are equal."""
    infinite = torch.full_like(score, float("inf"))
    low = (score if valid is None else torch.where(valid, score, infinite)).amin(-1, keepdim=True)
    high = (score if valid is None else torch.where(valid, score, -infinite)).amax(-1, keepdim=True)
    return torch.where(high > low, (score - low) / (high - low), 1.0)
