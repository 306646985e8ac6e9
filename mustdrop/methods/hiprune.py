"""HiPrune (arXiv 2508.00553): what a middle block of the vision encoder attends to, its neighbours, and the last's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mustdrop import ops
from mustdrop.attention import cls_attention
from mustdrop.checks import check_layers, require
from mustdrop.hooks import Keep, VisionStep
from mustdrop.methods.salience import InTower
from mustdrop.reach import Touch, Tower

NEIGHBOURS = 5  # an anchor with its four neighbours


@dataclass
class HiPrune(InTower):
    """HiPrune.

    A token is as good as the attention that all tokens pay it, CLS among them, mean over heads. The best of a middle
    block of the vision encoder are anchors and stay with their four neighbours; the other places go to the best of the
    last block that is run. It needs no CLS and no question.

    `retain`, `compat` and `per` as in `InTower`.

    Parameters
    ----------
    alpha : float
        Share of them that are anchors and neighbours.
    object_block : int or float
        The middle block, counted from 0; a float is a fraction of the encoder's depth. Default: 8 of 24 blocks.
    compat : {"default", "official"}
        "official": positions are consecutive, and the left neighbour of a row's first patch is the last one of the row
        above.
    """

    alpha: float = 0.1
    object_block: int | float = 8 / 24

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.alpha <= 1, "alpha", self.alpha, "between 0 and 1")

    def check(self, layers: int, blocks: int) -> None:
        check_layers("object_block", [self.object_block], blocks)

    def check_tower(self, tower: Tower) -> None:
        block, right = ops.layer_index(self.object_block, tower.blocks), f"below {tower.last}, the last that is run"
        require(block < tower.last, "object_block", self.object_block, right)
        tower.check_compares("object_block", self.object_block, block)

    def touches(self, tower: Tower) -> Touch:
        last, middle = tower.last, ops.layer_index(self.object_block, tower.blocks)
        return Touch(changes=frozenset({last}), reads=frozenset({middle, last}))

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        tokens = step.tokens
        if step.block == ops.layer_index(self.object_block, step.blocks):
            return Keep.note(object_attention=cls_attention(step.attention, tokens, by_all=True))
        counts = self.counts(tokens) if step.last else None
        if counts is None:
            return None
        anchors = [round(self.alpha * count / NEIGHBOURS) for count in counts]
        middle, wraps = tokens.notes["object_attention"], self.compat == "official"
        first = with_neighbours(middle, anchors, tokens.patch_index, tokens.grid, tokens.valid, wraps)
        return Keep.top(cls_attention(step.attention, tokens, by_all=True).masked_fill(first, float("inf")), counts)


def with_neighbours(
    score: Tensor,
    anchors: Sequence[int],
    patch_index: Tensor,
    grid: tuple[int, int],
    valid: Tensor | None = None,
    wraps: bool = False,
) -> Tensor:
    """Mark the best tokens of every row and those on the four patches around them (HiPrune, section 4.2).

    Parameters
    ----------
    score : `[rows, tokens]`
    anchors : sequence of int
        How many are the best of every row.
    patch_index : int64 `[rows, tokens]`
        The patch of a `grid` (rows, columns) that each token sits on.
    valid : bool `[rows, tokens]`, optional
        False for padding.
    wraps : bool
        Whether left of a row's first patch is the last one of the row above, and none is outside: there is the nearest.

    Returns
    -------
    bool `[rows, tokens]`
    """
    score = score if valid is None else score.masked_fill(~valid, float("-inf"))
    most, wanted = ops.for_rows(list(anchors), score.device)
    if not most:
        return torch.zeros_like(score, dtype=torch.bool)
    best = patch_index.gather(1, score.argsort(dim=-1, descending=True, stable=True)[:, :most])
    (rows, columns), real = grid, torch.arange(most, device=score.device) < wanted
    row, column, around = best // columns, best % columns, [(best, real)]
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        if wraps:
            around.append(((best + down * columns + right).clamp(0, rows * columns - 1), real))
        else:
            inside = (row + down >= 0) & (row + down < rows) & (column + right >= 0) & (column + right < columns)
            around.append((best + (down * columns + right) * inside, real & inside))
    at, real = (torch.cat([pair[part].expand_as(best) for pair in around], dim=1) for part in (0, 1))
    near = torch.zeros(len(best), rows * columns + 1, dtype=torch.bool, device=score.device)
    near = near.scatter(1, at.masked_fill(~real, rows * columns), True)
    near[:, -1] = False
    return near.gather(1, patch_index)
