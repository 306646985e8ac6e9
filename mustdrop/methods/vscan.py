"""VScan (arXiv 2505.22654): local and global attention choose, the others are merged in, and half the way the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop import ops
from mustdrop.attention import cls_attention
from mustdrop.checks import check_layers, one_of
from mustdrop.compose import Compose
from mustdrop.hooks import DecoderStep, Keep, VisionStep
from mustdrop.methods.two_stages import Entrance, Inside, step_attention
from mustdrop.reach import Touch, Tower

SIDE = 4  # windows along each side of a view


@dataclass
class VScan(Compose):
    """VScan.

    One and a half times `retain` tokens of every image enter the decoder: half of them are, in each of 4 x 4 windows,
    the ones that CLS pays most attention in an early block of the vision encoder, the others those that it pays most in
    the last one that is run (without CLS: that all tokens pay). After the projector every other token is averaged into
    the one most similar to it. From the middle of the decoder on, half of `retain` stay, by the attention that the
    prompt's last token would pay them in the layer to come. The mean over the layers is `retain`.

    Parameters
    ----------
    retain : int or float
        Mean vision tokens per decoder layer and image with all its views; a float is a share of its patches.
    local_block : int or float
        The early block, counted from 0; a float is a fraction of the encoder's depth. Default: 5 of 24 blocks.
    compat : {"default", "official"}
        "official": positions are renumbered, a generated token's position is the layer's cache length, and what windows
        do not share evenly is not given to any.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """

    retain: int | float = 64
    local_block: int | float = 5 / 24
    compat: str = "default"

    def __post_init__(self) -> None:
        one_of("compat", self.compat, ("default", "official"))
        official = self.compat == "official"
        parts = [
            _LocalAndGlobal(self.retain, 1.5, self.local_block, official),
            _ByLastToken(self.retain, {0.5: 0.5}, 1.5),
        ]
        super().__init__(parts, *(("renumber", "cache_length") if official else ("original", "continue")))


@dataclass
class _LocalAndGlobal(Entrance):
    local_block: int | float = 5 / 24
    official: bool = False

    def kept(self, patches: int, tokens: int) -> int:
        count = super().kept(patches, tokens)
        return count if count == tokens else self._local(count) + count - count // 2

    def _local(self, count: int) -> int:
        """How many of the tokens that enter are the best of windows."""
        return count // 2 - count // 2 % SIDE**2 * self.official

    def check(self, layers: int, blocks: int) -> None:
        check_layers("local_block", [self.local_block], blocks)

    def touches(self, tower: Tower) -> Touch:
        return Touch(reads=frozenset({tower.last, ops.layer_index(self.local_block, tower.blocks)}))

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        notes = {}
        if step.block == ops.layer_index(self.local_block, step.blocks):
            window = window_of(step.tokens.patch_index, step.tokens.grid)
            notes["window_order"] = by_rank(cls_attention(step.attention, step.tokens), window, step.tokens.valid)
        if step.last:
            notes["cls_attention"] = cls_attention(step.attention, step.tokens)
        return Keep.note(**notes) if notes else None

    def on_projected_features(self, step: VisionStep) -> Keep | None:
        tokens, counts = step.tokens, self.counts(step.tokens)
        if counts is None:
            return None
        sizes = zip(tokens.known_patches, tokens.known_lengths, strict=True)
        local = [self._local(Entrance.kept(self, *size)) for size in sizes]
        order = tokens.notes["window_order"]
        order = order if tokens.valid is None else order.masked_fill(~tokens.valid, float("-inf"))
        first = ops.top_count(order, ops.for_rows(local, order.device)[1])
        stays = best_with(tokens.notes["cls_attention"], first, counts, tokens.valid)
        return Keep.merge(nearest_of(tokens.patches, stays, tokens.valid), counts)


class _ByLastToken(Inside):
    def score(self, step: DecoderStep) -> Tensor:
        return step_attention(step).mean_over_heads(step.tokens.last_row())[:, 0]


def window_of(patch: Tensor, grid: tuple[int, int]) -> Tensor:
    """The one of 4 x 4 windows in which a patch of a `grid` (rows, columns) lies, int64 like `patch`."""
    return patch // grid[1] * SIDE // grid[0] * SIDE + patch % grid[1] * SIDE // grid[1]


def by_rank(attention: Tensor, window: Tensor, valid: Tensor | None = None) -> Tensor:
    """A score by which the best of every window come first, then the second best, ...; all `[rows, tokens]`.

    Attention is below 1: of equal ranks in their windows the better token is in front.
    """
    own = window[:, None] == torch.arange(SIDE**2, device=window.device)[:, None]
    own = own if valid is None else own & valid[:, None]
    rank = attention[:, None].masked_fill(~own, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    return attention - (rank.argsort(dim=-1) * own).sum(1)


def best_with(score: Tensor, first: Tensor, counts: Sequence[int], valid: Tensor | None = None) -> Tensor:
    """Mark so many of every row, those of `first` and the best of the others by `score`: bool `[rows, tokens]`."""
    score = score.masked_fill(first, float("inf"))
    score = score if valid is None else score.masked_fill(~valid, float("-inf"))
    return ops.top_count(score, ops.for_rows(list(counts), score.device)[1])


def nearest_of(features: Tensor, stays: Tensor, valid: Tensor | None = None) -> Tensor:
    """For every token the one of `stays` bool `[rows, tokens]` most similar to it by cosine, itself if it stays: int64.

    `features` `[rows, tokens, width]`.
    """
    units = F.normalize(features.float(), dim=-1)
    nearest = (units @ units.transpose(1, 2)).masked_fill(~stays[:, None], -2).argmax(-1)
    own = stays if valid is None else stays | ~valid
    return torch.where(own, torch.arange(stays.shape[1], device=stays.device), nearest)
