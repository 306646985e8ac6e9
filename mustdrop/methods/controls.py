"""The plain controls of an honest table: fewer vision tokens without looking at the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from mustdrop import ops
from mustdrop.checks import require
from mustdrop.hooks import Keep, VisionStep, VisionTokens
from mustdrop.methods.retaining import Retaining
from mustdrop.reach import Touch, Tower


@dataclass
class Control(Retaining):
    """Base of the controls: they act once, on the features that the vision encoder gives.

    Parameters
    ----------
    retain : int or float
        Tokens that every image keeps with all its views; a float is a share of its patches. All it has, or more:
        nothing is done.
    per : {"image", "view"}
        "view": that many of every tile or frame, instead of an image with all of them.
    """

    counts_at: ClassVar[str] = "after_vision_block"

    retain: int | float = 64
    per: str = field(default="image", kw_only=True)

    def touches(self, tower: Tower) -> Touch:
        return Touch(changes=frozenset({tower.last}))

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        counts = self.counts(step.tokens) if step.last else None
        return None if counts is None else self.reduce(step.tokens, counts)

    def reduce(self, tokens: VisionTokens, counts: list[int]) -> Keep:
        """The tokens that go on, so many of each row."""
        raise NotImplementedError


@dataclass
class Random(Control):
    """A random subset, drawn evenly from all there are.

    The draw depends on the seed and the grid alone: an image keeps the same patches in any batch and with any
    question. Several seeds show how much the draw matters.

    Parameters
    ----------
    seed : int
        Of the draw.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.seed < 1 << 63, "seed", self.seed, "0 or more, and below 2^63")

    def reduce(self, tokens: VisionTokens, counts: list[int]) -> Keep:
        generator = torch.Generator().manual_seed(self.seed)
        score = torch.rand(tokens.patch_to_token.shape[1], generator=generator).to(tokens.hidden.device)
        return Keep.top(score[tokens.patch_index], counts)


@dataclass
class Uniform(Control):
    """The middle patch of every cell of an even grid."""

    def reduce(self, tokens: VisionTokens, counts: list[int]) -> Keep:
        cell, middle = cells(tokens, counts)
        in_the_middle = middle.gather(1, cell) == torch.arange(cell.shape[1], device=cell.device)
        return Keep.top(in_the_middle.gather(1, tokens.patch_index).float(), counts)


@dataclass
class AveragePool(Control):
    """The mean of every cell of an even grid; the merged token sits on its middle patch and owns all of them."""

    def reduce(self, tokens: VisionTokens, counts: list[int]) -> Keep:
        cell, middle = cells(tokens, counts)
        column = torch.arange(tokens.patch_index.shape[1], device=cell.device)
        own = cell.gather(1, tokens.patch_index)
        middle_first = column + len(column) * (tokens.patch_index != middle.gather(1, own))
        first = torch.full_like(middle, 2 * len(column)).scatter_reduce(1, own, middle_first, "amin")
        all_there = len(column) == cell.shape[1]
        return Keep.merge(first.gather(1, own) % len(column), counts if all_there else None)

    def leaves(self, grid: tuple[int, int], tokens: int) -> int | None:
        """Of an image of which some patches are gone, not every cell has a token."""
        return super().leaves(grid, tokens) if tokens == grid[0] * grid[1] else None


def cells(tokens: VisionTokens, counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """An even grid of so many cells for each row's patches, see `ops.grid_cells`; one for each where all tokens stay.

    The cell of every patch, int64 `[rows, patches]`, and the patch in the middle of every cell, int64 `[rows, cells]`.
    """
    patches, pairs = tokens.patch_to_token.shape[1], zip(counts, tokens.known_lengths, strict=True)
    wanted = [max(1, count) if count < length else patches for count, length in pairs]
    known = {count: ops.grid_cells(tokens.grid, count, tokens.device) for count in set(wanted)}
    cell, middle = zip(*map(known.get, wanted), strict=True)
    return torch.stack(cell), pad_sequence(middle, batch_first=True)
