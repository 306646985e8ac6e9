"""InternVL as transformers has it, and InternVL2 translated to it: tiles and a thumbnail of each image."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from llava.model.hosted.base import OneLayerHost
from llava.model.hosted.layout import Layout, frames
from llava.model.hosted.towers import internvit
from mustdrop.hooks import Reducer


class InternVL(OneLayerHost):
    """`InternVLForConditionalGeneration`: an image is a run of placeholders, one tile after another.

    A vision token is a unit of patches. How the tiles lie beside each other is not told, so each is a grid of its own;
    a frame of a video has a run of its own and is an image.
    """

    kinds: ClassVar[tuple[str, ...]] = ("internvl_vision",)
    any_size: ClassVar[bool] = True
    frames_are_tiles: ClassVar[bool] = True

    @property
    def merge(self) -> int:
        """Patches along the side of a unit."""
        return round(1 / self.model.config.downsample_ratio)

    def tower_parts(self) -> list[tuple[nn.Module, Callable, tuple]]:
        tower = self.inner.vision_tower
        blocks = [(block, internvit.block, (number, block)) for number, block in enumerate(tower.encoder.layer)]
        return [(tower, internvit.forward, (self, tower)), *blocks]

    def layouts(self, inputs: dict[str, Any]) -> list[tuple[str, Layout]]:
        pixels = inputs.get("pixel_values")
        if pixels is None or not len(pixels):
            return []
        grid = self.grid(pixels)
        tiles = self.tiles(inputs.get("input_ids"), len(pixels), grid[0] * grid[1])
        known = {count: frames(count, grid) for count in set(tiles)}
        return [("image", known[count]) for count in tiles]

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of units of tiles `[tiles, 3, height, width]`."""
        sides = zip(pixels.shape[-2:], self.vision_config.patch_size, strict=True)
        rows, columns = (size // patch // self.merge for size, patch in sides)
        return rows, columns

    def tiles(self, ids: Tensor | None, total: int, each: int) -> list[int]:
        """Tiles of each image, in their order, from prompts `[prompts, length]` with `each` placeholders for a tile.

        Where placeholders do not come in whole tiles, every tile is an image.
        """
        if ids is None:
            return [1] * total
        shown = F.pad(ids.cpu() == self.placeholder_ids["image"], (1, 1)).flatten().int()
        edges = shown.diff().nonzero()[:, 0].tolist()
        runs = [end - start for start, end in list(pairwise(edges))[::2]]
        whole = sum(runs) == total * each and not any(run % each for run in runs)
        return [run // each for run in runs] if whole else [1] * total

    def check(self, reducer: Reducer) -> None:
        super().check(reducer)
        heads, side = self.config.num_attention_heads, self.vision_config.image_size[0]
        units = (side // self.vision_config.patch_size[0] // self.merge) ** 2
        reducer.check_sizes(self.num_layers, self.num_vision_layers, self.blocks_run, units, heads, one_view=False)
