"""Stage 1, in the vision encoder: merge similar neighbours, fix the key token set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mustdrop import ops
from mustdrop.attention import cls_attention
from mustdrop.checks import one_of, require
from mustdrop.greedy import Coverage, cosines, in_turn
from mustdrop.hooks import Keep, Reducer, VisionStep, VisionTokens
from mustdrop.reach import Touch, Tower, square
from mustdrop.retain import check_per, check_retain
from mustdrop.stages.budget import Target


@dataclass
class LocalSpatialMerge(Reducer):
    """Local spatial merging (MustDrop, section 3.2): windows of similar patches become one token each.

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
        "raster": a merged token takes its window's place in the image. "score" (the authors'): merged tokens come
        first, the most similar first.
    count : {"per_image", "batch_minimum"}
        "batch_minimum" (the authors'): every image of the batch merges as many windows as the one with fewest.
    merge_to : int or float, optional
        Instead of the threshold: exactly so many tokens are left of every image with all its views (a float is a share
        of its patches), those windows being merged that are most similar in their view. Shapes then depend on nothing
        in the image.
    per : {"image", "view"}
        "view": that many of every tile or frame, instead of an image with all of them.
    target : Target, optional
        Instead of `merge_to`: the numbers of a whole reducer.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """

    counts_at: ClassVar[str] = "after_vision_block"

    window: int = 3
    similarity_threshold: float = 0.8
    block: int = 0
    order: str = "raster"
    count: str = "per_image"
    merge_to: int | float | None = None
    per: str = "image"
    target: Target | None = None

    def __post_init__(self) -> None:
        require(self.window >= 2, "window", self.window, "an integer of at least 2")
        one_of("order", self.order, ("raster", "score"))
        one_of("count", self.count, ("per_image", "batch_minimum"))
        require(self.merge_to is None or self.merge_to > 0, "merge_to", self.merge_to, "more than 0")
        check_per(self.per)
        self.target = self.target or Target(window=self.window, merge_to=self.merge_to)

    def merged(self, patches: int, grid: tuple[int, int] | None = None) -> int:
        """Tokens that are left of an image of one view (by default a square one) whatever it shows.

        Raises ValueError if `merge_to` is out of reach.
        """
        return self.target.solve(patches, grid=grid or (math.isqrt(patches),) * 2).merged

    def check_tokens(self, layers: int, tokens: int) -> None:
        self.check_counts(layers, square(tokens), tokens)

    def check_counts(self, layers: int, grid: tuple[int, int], tokens: int, keys: int = 0) -> None:
        if self.target.merges:
            self.merged(tokens, grid)
        right = f"at most {min(grid)}, the side of the patch grid"
        require(self.window <= min(grid), "window", self.window, right)

    def check(self, layers: int, blocks: int) -> None:
        require(0 <= self.block < blocks, "merge_block", self.block, f"between 0 and {blocks - 1}, the last ViT block")

    def check_tower(self, tower: Tower) -> None:
        right = f"between 0 and {tower.last}, the last ViT block that is run"
        require(self.block < tower.run, "merge_block", self.block, right)

    def leaves(self, grid: tuple[int, int], tokens: int) -> int | None:
        return min(tokens, self.merged(grid[0] * grid[1], grid)) if self.target.merges else None

    def touches(self, tower: Tower) -> Touch:
        return Touch(changes=frozenset({self.block}), needs_all=True)

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        tokens = step.tokens
        if step.block != self.block or min(tokens.grid) < self.window:
            return None
        windows, left = self._windows(tokens), None
        if windows is not None and not any(windows):
            return None
        score = ops.window_similarity(tokens.patches, tokens.grid, self.window)
        if windows is not None:
            merge = ops.top_count(score, ops.for_rows(windows, score.device)[1])
            left = [tokens.patch_index.shape[1] - number * (self.window**2 - 1) for number in windows]
        elif self.count == "batch_minimum":
            merge = score >= self.similarity_threshold
            merge = ops.top_count(score, merge.sum(-1).min())
        else:
            merge = score >= self.similarity_threshold
        return merge_windows(tokens, merge, self.window, left, score if self.order == "score" else None)

    def _windows(self, tokens: VisionTokens) -> list[int] | None:
        """Windows of each row that merge, where numbers say so."""
        if not self.target.merges:
            return None
        return tokens.divided(lambda patches, _: self.target.solve(patches, grid=tokens.grid).windows, self.per)


def merge_windows(
    tokens: VisionTokens,
    merge: Tensor,
    window: int,
    left: int | list[int] | None = None,
    score: Tensor | None = None,
) -> Keep:
    """Replace the tokens of chosen windows by their plain mean, which sits on the window's middle patch.

    Parameters
    ----------
    tokens : VisionTokens
        One token per patch.
    merge : bool `[images, windows]`
        The windows to merge.
    window : int
        Side of a window.
    left : int or list of int, optional
        Tokens that are left of every image, or of each, if the host knows it.
    score : `[images, windows]`, optional
        When given, merged tokens come first, by falling score, then the others; otherwise raster order is kept.
    """
    raster, windows = tokens.patch_index, merge.shape[1]
    inside = ops.cut_windows(raster[..., None], tokens.grid, window)[..., 0]
    columns, middle = inside.flatten(1), inside[..., (window // 2) * (window + 1), None]
    # The middle patch of a merged window holds the mean of the window, the patches around it point to the middle.
    means = ops.cut_windows(tokens.patches, tokens.grid, window).mean(2)
    states, row = tokens.patches.clone(), torch.arange(len(inside), device=inside.device)[:, None]
    states[row, middle[..., 0]] = torch.where(merge[..., None], means, states[row, middle[..., 0]])
    merge_into = raster.scatter(1, columns, torch.where(merge[..., None], middle, inside).flatten(1))
    order = None
    if score is not None:
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        first = torch.where(merge, rank, windows)[..., None] + torch.where(merge[..., None], 0, inside)
        order = (windows + raster).scatter(1, columns, first.flatten(1))
    stays, more = merge_into == raster, {"states": states, "merge_into": merge_into, "order": order}
    return Keep.where(stays, **more) if left is None else Keep.top(stays.float(), left, **more)


@dataclass
class KeyTokens(Reducer):
    """The key token set (MustDrop, section 3.2): tokens the image itself holds important are never dropped.

    Importance is the attention the CLS token pays to a patch token, mean over heads. An encoder without CLS has no
    such row: there it is the attention that all patch tokens pay it, on average.

    Parameters
    ----------
    rate : float
        Share of the tokens that remain of an image with all its views after merging, rounded up.
    block : int
        Encoder block whose attention is read; -1 is the last one, which need not be run for it.
    per : {"image", "view"}
        "view": the share is rounded up for every tile or frame.
    target : Target, optional
        Instead of `rate`: the numbers of a whole reducer. If these keep every token, none is chosen.
    """

    rate: float = 0.08
    block: int = -1
    per: str = "image"
    target: Target | None = None

    def __post_init__(self) -> None:
        require(0 <= self.rate <= 1, "key_rate", self.rate, "between 0 and 1")
        check_per(self.per)
        self.target = self.target or Target(key_rate=self.rate)

    def check(self, layers: int, blocks: int) -> None:
        require(-blocks <= self.block < blocks, "key_block", self.block, f"between -{blocks} and {blocks - 1}")

    def check_tower(self, tower: Tower) -> None:
        block, right = self.block % tower.blocks, f"at most {tower.run}: of {tower.blocks} ViT blocks so many are run"
        require(block <= tower.run, "key_block", self.block, right)
        tower.check_compares("key_block", self.block, block)

    def protects(self, grid: tuple[int, int], tokens: int) -> int:
        return self._keys(grid[0] * grid[1], tokens)

    def touches(self, tower: Tower) -> Touch:
        block = self.block % tower.blocks
        here = frozenset({min(block, tower.last)})
        return Touch(reads=here) if block < tower.run else Touch(reads_next=here)

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        block = self.block % step.blocks
        if step.block == block:
            attention = step.attention
        elif step.last and step.block + 1 == block:
            attention = step.next_attention
        else:
            return None
        tokens, counts = step.tokens, step.tokens.divided(self._keys, self.per)
        if not any(counts):
            return None
        return Keep.protect(cls_attention(attention, tokens), counts)

    def _keys(self, patches: int, tokens: int) -> int:
        return self.target.solve(patches, tokens=tokens).keys


@dataclass
class DiverseTokens(Reducer):
    """Tokens that others stand for do not enter the decoder; not part of the published method.

    After the projector every image keeps so many, the key tokens first.

    Parameters
    ----------
    count : int or float, optional
        Tokens that every image keeps with all its views; a float is a share of its patches. All it has, or more:
        nothing is done.
    target : Target, optional
        Instead: the numbers of a whole reducer.
    entrance : {"difference", "coverage"}
        "difference": those that repeat others least, all in one step, see `ops.redundancy`; what DivPrune (arXiv
        2503.02175) chooses one token at a time, by the same measure of similarity. "coverage": those that together
        stand best for all (facility location), each chosen in view of those before it, see `greedy.Coverage`.
    """

    count: int | float | None = None
    target: Target | None = None
    entrance: str = "difference"

    def __post_init__(self) -> None:
        check_retain(self.count, field="diverse")
        one_of("entrance", self.entrance, ("difference", "coverage"))
        self.target = self.target or Target(diverse=self.count)

    def leaves(self, grid: tuple[int, int], tokens: int) -> int:
        return self._entering(grid[0] * grid[1], tokens)

    def on_projected_features(self, step: VisionStep) -> Keep | None:
        tokens, counts = step.tokens, step.tokens.divided(self._entering)
        if counts == list(tokens.known_lengths):
            return None
        if self.entrance == "coverage":
            return Keep.top(self._turns(tokens, counts), counts)
        return Keep.top(-ops.redundancy(tokens.patches, tokens.valid, tokens.protected), counts)

    def _turns(self, tokens: VisionTokens, counts: list[int]) -> Tensor:
        """How early each token is chosen to stand for others; key tokens, which stay in any case, do so already."""
        keys = tokens.keys or (0,) * len(counts)
        coverage = Coverage(cosines(tokens.patches), tokens.valid, tokens.protected)
        free = tokens.valid
        if tokens.protected is not None:
            free = ~tokens.protected if free is None else free & ~tokens.protected
        most = max(count - key for count, key in zip(counts, keys, strict=True))
        return in_turn(max(1, most), coverage.gain, coverage.take, free)

    def _entering(self, patches: int, tokens: int) -> int:
        return self.target.solve(patches, tokens=tokens, keys=0).entering
