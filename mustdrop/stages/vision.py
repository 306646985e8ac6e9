"""Stage 1, in the vision encoder: merge similar neighbours, fix the key token set."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mustdrop import ops
from mustdrop.checks import one_of, require
from mustdrop.hooks import Reducer, VisionStep, VisionTokens


@dataclass
class LocalSpatialMerge(Reducer):
    """Local spatial merging (MustDrop, section 3.2): windows of look-alike patches become one token each.

    Once, on the output of one encoder block; the blocks after it run on fewer tokens. CLS is not touched. A rim of the
    grid that the window does not divide is never merged.

    Parameters
    ----------
    window : int
        Side of a window in patches.
    similarity_threshold : float
        A window merges if the mean cosine similarity of its tokens is at least this.
    block : int
        Encoder block after which to merge, counted from 0.
    order : {"raster", "score"}
        "raster": a merged token takes its window's place in the picture. "score" (the authors'): merged tokens come
        first, the most alike first.
    count : {"per_image", "batch_minimum"}
        "batch_minimum" (the authors'): every image of the batch merges as many windows as the one with fewest.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """

    window: int = 3
    similarity_threshold: float = 0.8
    block: int = 0
    order: str = "raster"
    count: str = "per_image"

    def __post_init__(self) -> None:
        require(self.window >= 2, "window", self.window, "an integer of at least 2")
        one_of("order", self.order, ("raster", "score"))
        one_of("count", self.count, ("per_image", "batch_minimum"))

    def check(self, layers: int, blocks: int) -> None:
        require(0 <= self.block < blocks, "merge_block", self.block, f"between 0 and {blocks - 1}, the last ViT block")

    def after_vision_block(self, step: VisionStep) -> VisionTokens | None:
        tokens = step.tokens
        if step.block != self.block or min(tokens.grid) < self.window:
            return None
        score = ops.window_similarity(tokens.patches, tokens.grid, self.window)
        merge = score >= self.similarity_threshold
        if self.count == "batch_minimum":
            rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
            merge = rank < merge.sum(-1).min()
        return ops.merge_windows(tokens, merge, self.window, score if self.order == "score" else None)


@dataclass
class KeyTokens(Reducer):
    """The key token set (MustDrop, section 3.2): tokens the image itself holds important are never dropped.

    Importance is the attention the CLS token pays to a patch token, mean over heads. An encoder without CLS has no
    such row: there it is the attention that all patch tokens pay it, on average.

    Parameters
    ----------
    rate : float
        Share of the tokens that remain after merging, rounded up.
    block : int
        Encoder block whose attention is read; -1 is the last one, which need not be run for it.
    """

    rate: float = 0.08
    block: int = -1

    def __post_init__(self) -> None:
        require(0 <= self.rate <= 1, "key_rate", self.rate, "between 0 and 1")

    def check(self, layers: int, blocks: int) -> None:
        require(-blocks <= self.block < blocks, "key_block", self.block, f"between -{blocks} and {blocks - 1}")

    def after_vision_block(self, step: VisionStep) -> VisionTokens | None:
        block = self.block % step.blocks
        if step.block == block:
            attention = step.attention
        elif step.last and step.block + 1 == block:
            attention = step.next_attention
        else:
            return None
        tokens = step.tokens
        rows = torch.arange(tokens.prefix or tokens.patches.shape[1], device=tokens.hidden.device)
        rows = rows[: 1 if tokens.prefix else None].expand(len(tokens.hidden), -1)
        score = attention.mean_over_heads(rows).mean(1)[:, tokens.prefix :]
        if tokens.valid is not None:
            score = score.masked_fill(~tokens.valid, float("-inf"))
        return replace(tokens, protected=ops.top_share(score, self.rate, tokens.counts))
