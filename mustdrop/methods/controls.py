"""The plain controls of an honest table: fewer vision tokens without looking at the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mustdrop import ops
from mustdrop.checks import require
from mustdrop.hooks import Keep, Reducer, VisionStep, VisionTokens
from mustdrop.reach import Touch, Tower


@dataclass
class Control(Reducer):
    """Base of the controls: they act once, on the features that the vision encoder gives.

    Parameters
    ----------
    retain : int
        Tokens that every image keeps. All it has, or more: nothing is done.
    """

    counts_at: ClassVar[str] = "after_vision_block"

    retain: int = 64

    def __post_init__(self) -> None:
        require(self.retain > 0, "retain", self.retain, "1 or more")

    def leaves(self, grid: tuple[int, int], tokens: int) -> int:
        return min(tokens, self.retain)

    def touches(self, tower: Tower) -> Touch:
        return Touch(changes=frozenset({tower.last})) if self.retain < tower.patches else Touch()

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        return self.reduce(step.tokens) if step.last and self.retain < step.tokens.patch_index.shape[1] else None

    def reduce(self, tokens: VisionTokens) -> Keep:
        """The tokens that go on, of more than `retain`."""
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

    def reduce(self, tokens: VisionTokens) -> Keep:
        generator = torch.Generator().manual_seed(self.seed)
        score = torch.rand(tokens.patch_to_token.shape[1], generator=generator).to(tokens.hidden.device)
        return Keep.top(score[tokens.patch_index], self.retain)


@dataclass
class Uniform(Control):
    """The middle patch of every cell of an even grid."""

    def reduce(self, tokens: VisionTokens) -> Keep:
        _, middle = ops.grid_cells(tokens.grid, self.retain, tokens.hidden.device)
        chosen = torch.zeros_like(tokens.patch_to_token[0]).scatter(0, middle, 1)
        return Keep.top(chosen[tokens.patch_index].float(), self.retain)


@dataclass
class AveragePool(Control):
    """The mean of every cell of an even grid; the merged token sits on its middle patch and owns all of them."""

    def reduce(self, tokens: VisionTokens) -> Keep:
        cell, middle = ops.grid_cells(tokens.grid, self.retain, tokens.hidden.device)
        column = torch.arange(tokens.patch_index.shape[1], device=cell.device)
        own = cell[tokens.patch_index]
        middle_first = column + len(column) * (tokens.patch_index != middle[own])
        first = torch.full_like(middle.expand(len(own), -1), 2 * len(column)).scatter_reduce(
            1, own, middle_first, "amin"
        )
        all_there = len(column) == len(cell)
        return Keep.merge(first.gather(1, own) % len(column), self.retain if all_there else None)

    def leaves(self, grid: tuple[int, int], tokens: int) -> int | None:
        """Of an image of which some patches are gone, not every cell has a token."""
        return super().leaves(grid, tokens) if tokens == grid[0] * grid[1] else None
