"""The control of a smaller image: the vision encoder sees fewer patches because the image has fewer pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from mustdrop.checks import require
from mustdrop.methods.retaining import Retaining


@dataclass
class SmallImage(Retaining):
    """A smaller input image.

    Images are scaled down (bicubic, antialiased) before they are cut into patches, the position embeddings of the
    vision encoder are interpolated, and everything after that computes on fewer patches: the encoder too. For
    models that take images of any size the processor does it, within a budget of pixels or of tiles, and the model only
    looks whether it did.

    Parameters
    ----------
    retain : int or float
        Tokens per image, as nearly as a grid of the image's proportions gives them: of 24 x 24 patches, 192 are
        14 x 14, 128 are 11 x 12, 64 are 8 x 8 and 32 are 5 x 6. A float is a share of its patches. All patches, or
        more: nothing is done.
    per : {"image", "view"}
        "view": that many of every tile or frame, instead of an image with all of them.

    Raises
    ------
    ValueError
        If `retain` is neither a positive number nor a share.
    """

    counts_at: ClassVar[str] = "on_pixels"

    retain: int | float = 64
    per: str = field(default="image", kw_only=True)

    def check_placeholders(self, any_size: bool = False) -> None:
        if not any_size:
            raise ValueError(
                "method: smallimage makes images smaller, but in transformers' own classes a prompt has a placeholder "
                "for every patch; use uniform or avgpool, or a checkpoint that llava.model.builder loads as our LLaVA"
            )
        right = (
            "a number of tokens, not a share, where a processor makes images smaller before a model is told their size"
        )
        require(not isinstance(self.retain, float), "retain", self.retain, right)

    def pixel_budget(self, views: int) -> int:
        return int(self.retain) * (views if self.per == "view" else 1)

    def shrinks(self, grid: tuple[int, int]) -> tuple[int, int]:
        return self._smaller(grid, 1)

    def _smaller(self, grid: tuple[int, int], views: int) -> tuple[int, int]:
        """The grid of each of so many views of an image."""
        patches = grid[0] * grid[1]
        count = self.kept(views * patches, views * patches) / views
        return grid if count == patches else nearest_grid(grid, count)

    def leaves(self, grid: tuple[int, int], tokens: int) -> int:
        return grid[0] * grid[1]

    def on_pixels(self, images: Tensor, patch_size: int) -> Tensor | None:
        return self.pixels_of_views(images, patch_size, (1,) * len(images))

    def pixels_of_views(self, images: Tensor, patch_size: int, views: Sequence[int]) -> Tensor | None:
        grid = tuple(side // patch_size for side in images.shape[-2:])
        grids = {self._smaller(grid, number if self.per == "image" else 1) for number in views}
        if len(grids) > 1:
            raise ValueError(
                f"retain is {self.retain}: images of {sorted(set(views))} views in one batch would need different "
                "sizes, it must be meant per view (per: view), or the images come one at a time"
            )
        (smaller,) = grids
        if smaller == grid:
            return None
        size = [side * patch_size for side in smaller]
        return F.interpolate(images.float(), size, mode="bicubic", antialias=True).to(images.dtype)


def nearest_grid(grid: tuple[int, int], count: float) -> tuple[int, int]:
    """The sides of a smaller grid of `count` patches, as nearly as the proportions of `grid` allow.

    A side is at most one patch off from what the other one asks for.
    """
    exact = [(count * side / other) ** 0.5 for side, other in (grid, grid[::-1])]
    sides = [[min(max(1, int(side) + more), most) for more in (0, 1)] for side, most in zip(exact, grid, strict=True)]
    return min(product(*sides), key=lambda pair: (abs(pair[0] * pair[1] - count), pair))
