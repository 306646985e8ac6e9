"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL as transformers has them: images and videos of any size, positions on 3 axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.utils import logging

from llava.model.hosted.base import Host
from llava.model.hosted.decoder import Deepstack, DeepstackDecoder, HostedDecoder
from llava.model.hosted.layout import Layout, frames
from llava.model.hosted.towers import qwen
from mustdrop.hooks import Reducer, Tower

logger = logging.get_logger(__name__)


class QwenVL(Host):
    """What the three have in common. A vision token is a unit of patches; a video has as many views as frame pairs."""

    changing: ClassVar[tuple[str, ...]] = ("rope_deltas",)
    any_size: ClassVar[bool] = True

    def tower_parts(self) -> list[tuple[nn.Module, Callable, tuple]]:
        tower = self.inner.visual
        blocks = [(block, qwen.block, (number, block)) for number, block in enumerate(tower.blocks)]
        return [(tower, qwen.forward, (self, tower)), *blocks]

    def layouts(self, inputs: dict[str, Any]) -> list[tuple[str, Layout]]:
        merge = self.vision_config.spatial_merge_size
        known: dict[tuple, Layout] = {}
        found = []
        for kind in ("image", "video"):
            for size in sizes_of(inputs, kind):
                if size not in known:
                    known[size] = frames(size[0], (size[1] // merge, size[2] // merge))
                found.append((kind, known[size]))
        return found

    def going_on(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Our cache knows the positions; the stock code would work them out from what it remembers of a last prompt.
        return {**inputs, "position_ids": torch.zeros(3, 1, 1, dtype=torch.long)}

    def check(self, reducer: Reducer) -> None:
        super().check(reducer)
        name = type(reducer).__name__
        if reducer.positions == "renumber":
            logger.warning_once(
                f"positions: {name} numbers tokens anew, on this model along all three axes: images lose their rows "
                "and columns"
            )
        blocks = self.num_vision_layers
        reducer.check_sizes(self.num_layers, blocks, blocks, heads=self.config.num_attention_heads)
        tower = self.tower((1, 1))  # of an image this small no number is out of reach
        reducer.check_tower(tower)
        if tower.last in self.windowed & reducer.touches(tower).reads:
            full = self.vision_config.fullatt_block_indexes
            raise ValueError(
                f"fullatt_block_indexes is {full}: it must hold {tower.last}, the last block of the tower, by whose "
                f"attention {name} chooses"
            )

    @property
    def windowed(self) -> frozenset[int]:
        """Blocks of the tower in which a patch sees its window alone."""
        return frozenset()

    def tower(self, grid: tuple[int, int]) -> Tower:
        """What a reducer is told of the tower, for images of so many rows and columns of units."""
        return Tower(self.num_vision_layers, self.num_vision_layers, grid, self.windowed)

    def check_images(self, reducer: Reducer, sizes: Sequence[tuple[int, int, int]]) -> None:
        """Raise ValueError if the settings do not fit images of these sizes: frames, rows and columns of patches."""
        merge = self.vision_config.spatial_merge_size
        for grid in {(rows // merge, columns // merge) for _, rows, columns in sizes}:
            reducer.check_tower(self.tower(grid))


class Qwen2VL(QwenVL):
    """`Qwen2VLForConditionalGeneration`."""

    texts: ClassVar[tuple[str, ...]] = ("qwen2_vl_text",)
    kinds: ClassVar[tuple[str, ...]] = ("qwen2_vl_vision",)


class Qwen25VL(QwenVL):
    """`Qwen2_5_VLForConditionalGeneration`: most blocks of the tower see windows alone."""

    texts: ClassVar[tuple[str, ...]] = ("qwen2_5_vl_text",)
    kinds: ClassVar[tuple[str, ...]] = ("qwen2_5_vl_vision",)

    @property
    def windowed(self) -> frozenset[int]:
        return frozenset(range(self.num_vision_layers)).difference(self.vision_config.fullatt_block_indexes)


class Qwen3VL(QwenVL):
    """`Qwen3VLForConditionalGeneration`: features of earlier blocks are added after the first decoder layers."""

    texts: ClassVar[tuple[str, ...]] = ("qwen3_vl_text",)
    kinds: ClassVar[tuple[str, ...]] = ("qwen3_vl_vision",)

    def decoder(self, given: dict[str, Any]) -> HostedDecoder:
        features = given.get("deepstack_visual_embeds")
        if not features:
            return super().decoder(given)
        return DeepstackDecoder(self.text, Deepstack.of(features, given["visual_pos_masks"]))


def sizes_of(inputs: dict[str, Any], kind: str) -> list[tuple[int, int, int]]:
    """Frames, rows and columns of patches of all images, or videos, of a batch."""
    grid = inputs.get(f"{kind}_grid_thw")
    return [] if grid is None else [tuple(size) for size in torch.as_tensor(grid).tolist()]
