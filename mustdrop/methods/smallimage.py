"""The control of a smaller image: the vision encoder sees fewer patches because the image has fewer pixels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from mustdrop.checks import require
from mustdrop.hooks import Reducer


@dataclass
class SmallImage(Reducer):
    """A smaller input image.

    Images are scaled down (bicubic, antialiased) before they are cut into patches, the position embeddings of the
    vision encoder are interpolated, and everything after that computes on fewer patches: the encoder too.

    Parameters
    ----------
    retain : int
        Tokens per image, as nearly as a grid of the image's proportions gives them: of 24 x 24 patches, 192 are
        14 x 14, 128 are 11 x 12, 64 are 8 x 8 and 32 are 5 x 6. All patches, or more: nothing is done.

    Raises
    ------
    ValueError
        If `retain` is not positive.
    """

    counts_at: ClassVar[str] = "on_pixels"

    retain: int = 64

    def __post_init__(self) -> None:
        require(self.retain > 0, "retain", self.retain, "1 or more")

    def check_placeholders(self) -> None:
        raise ValueError(
            "method: smallimage makes images smaller, but in transformers' own classes a prompt has a placeholder for "
            "every patch; use uniform or avgpool, or a checkpoint that llava.model.builder loads as our LLaVA"
        )

    def shrinks(self, grid: tuple[int, int]) -> tuple[int, int]:
        return grid if self.retain >= grid[0] * grid[1] else nearest_grid(grid, self.retain)

    def leaves(self, grid: tuple[int, int], tokens: int) -> int:
        return grid[0] * grid[1]

    def on_pixels(self, images: Tensor, patch_size: int) -> Tensor | None:
        grid = tuple(side // patch_size for side in images.shape[-2:])
        if self.retain >= grid[0] * grid[1]:
            return None
        size = [side * patch_size for side in self.shrinks(grid)]
        return F.interpolate(images.float(), size, mode="bicubic", antialias=True).to(images.dtype)


def nearest_grid(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """The sides of a smaller grid of `count` patches, as nearly as the proportions of `grid` allow.

    A side is at most one patch off from what the other one asks for.
    """
    exact = [(count * side / other) ** 0.5 for side, other in (grid, grid[::-1])]
    sides = [[min(max(1, int(side) + more), most) for more in (0, 1)] for side, most in zip(exact, grid, strict=True)]
    return min(product(*sides), key=lambda pair: (abs(pair[0] * pair[1] - count), pair))
