"""VisPruner (arXiv 2412.01818): the most attended tokens, and of the others those that no other repeats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop.attention import cls_attention
from mustdrop.checks import require
from mustdrop.hooks import Keep, VisionStep
from mustdrop.methods.salience import InTower

AT_ONCE = 8  # dropped in a round


@dataclass
class VisPruner(InTower):
    """VisPruner.

    On the output of the vision encoder, a part of the places goes to the tokens that CLS pays most attention (last
    block that is run; without CLS: that all tokens pay). The others are thinned out in rounds: of every second one, the
    few that are most similar to one of the tokens between them go, by cosine. The rest is put in order by these
    similarities for the next round, so that rounding may change all that follows.

    `retain`, `compat` and `per` as in `InTower`.

    Parameters
    ----------
    important_ratio : float
        Share of them that goes by attention.
    """

    important_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.important_ratio <= 1, "important_ratio", self.important_ratio, "between 0 and 1")

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        tokens = step.tokens
        counts = self.counts(tokens) if step.last else None
        if counts is None:
            return None
        attention, features = cls_attention(step.attention, tokens), tokens.patches
        if tokens.valid is not None:
            attention = attention.masked_fill(~tokens.valid, float("-inf"))
        stays = torch.zeros_like(attention, dtype=torch.bool)
        sizes = list(zip(tokens.known_lengths, counts, strict=True))
        for length, count in set(sizes):  # rows of equal size go through the rounds together
            rows = torch.tensor([row for row, size in enumerate(sizes) if size == (length, count)], device=stays.device)
            kept = least_repeated(features[rows], attention[rows], length, count, int(count * self.important_ratio))
            stays[rows] = stays[rows].scatter(1, kept, True)
        return Keep.top(stays.float(), counts)


def least_repeated(features: Tensor, attention: Tensor, length: int, count: int, important: int) -> Tensor:
    """The tokens that stay (VisPruner, section 3.3), int64 `[rows, count]`.

    Parameters
    ----------
    features : `[rows, tokens, width]`
    attention : `[rows, tokens]`
        Padding, behind the first `length` tokens of a row by attention, is never kept.
    length, count, important : int
        Tokens there are, that stay, and that stay by attention alone.
    """
    units = F.normalize(features.float(), dim=-1)
    order = attention.argsort(dim=-1, descending=True, stable=True)[:, :length]
    first, rest = order[:, :important], order[:, important:]
    while rest.shape[1] > count - important:
        even, odd = rest[:, ::2], rest[:, 1::2]
        if not odd.shape[1]:
            rest = rest[:, : count - important]
            break
        drop = min(AT_ONCE, rest.shape[1] - (count - important), even.shape[1])
        own, others = (units.gather(1, part[..., None].expand(-1, -1, units.shape[2])) for part in (even, odd))
        similarity = (own @ others.transpose(1, 2)).amax(-1)
        falling = similarity.argsort(dim=-1, descending=True, stable=True)
        rest = torch.cat([even.gather(1, falling[:, drop:]), odd], dim=1)
    return torch.cat([first, rest], dim=1)
