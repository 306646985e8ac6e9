"""LLaVA, LLaVA-NeXT, LLaVA-OneVision and Video-LLaVA as transformers has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from llava.model.hosted.base import OneLayerHost
from llava.model.hosted.layout import Layout, frames, pooled_frames, tiles
from llava.model.hosted.towers import vit
from mustdrop.hooks import Reducer

_ALL = "anyres_max_1000000"  # so many tiles are never blended


class LlavaLike(OneLayerHost):
    """A CLIP or SigLIP tower whose features come from one hidden state.

    Attributes
    ----------
    towers : tuple of str
        Where the model's vision towers are.
    fixed_size : bool
        Whether every image has as many vision tokens as a tower has patches.
    """

    kinds: ClassVar[tuple[str, ...]] = ("clip_vision_model", "siglip_vision_model")
    towers: ClassVar[tuple[str, ...]] = ("vision_tower",)
    fixed_size: ClassVar[bool] = False

    @property
    def side(self) -> int:
        """Patches along the side of a view."""
        return self.vision_config.image_size // self.vision_config.patch_size

    def tower_parts(self) -> list[tuple[nn.Module, Callable, tuple]]:
        towers = [getattr(self.inner, name) for name in self.towers]
        return [(tower, vit.forward, (self, tower)) for tower in towers]

    def check(self, reducer: Reducer) -> None:
        super().check(reducer)
        heads, patches, blocks = self.config.num_attention_heads, self.side**2, self.num_vision_layers
        reducer.check_sizes(self.num_layers, blocks, self.blocks_run, patches, heads, one_view=self.fixed_size)

    def with_cls(self, inputs: dict[str, Any]) -> bool:
        """Whether the CLS of a view is among its placeholders."""
        strategy = inputs.get("vision_feature_select_strategy") or self.model.config.vision_feature_select_strategy
        return strategy == "full" and self.vision_config.model_type == "clip_vision_model"

    def plain(self, inputs: dict[str, Any]) -> list[tuple[str, Layout]]:
        """Images of one view each."""
        pixels = _first(inputs, "pixel_values", "pixel_values_images")
        if pixels is None:
            return []
        return [("image", frames(1, (self.side, self.side), self.with_cls(inputs)))] * len(pixels)


class Llava(LlavaLike):
    """`LlavaForConditionalGeneration`."""

    fixed_size: ClassVar[bool] = True

    def layouts(self, inputs: dict[str, Any]) -> list[tuple[str, Layout]]:
        return self.plain(inputs)


class LlavaNext(LlavaLike):
    """`LlavaNextForConditionalGeneration`: an overview and tiles, stitched and without their padding."""

    def layouts(self, inputs: dict[str, Any]) -> list[tuple[str, Layout]]:
        if inputs.get("pixel_values") is None or not len(inputs["pixel_values"]):
            return []
        if self.with_cls(inputs):
            raise ValueError("vision_feature_select_strategy: got 'full', expected 'default': tiles have no CLS")
        known: dict[tuple, Layout] = {}
        found = []
        for number, size in enumerate(torch.as_tensor(inputs["image_sizes"]).tolist()):
            views = self.views(size, number, inputs)
            key = *size, views
            if key not in known:
                known[key] = self.layout(size, views, inputs)
            found.append(("image", known[key]))
        return found

    def views(self, size: list[int], number: int, inputs: dict[str, Any]) -> int:
        """Rows of the tower's batch that an image of a size (height, width) takes."""
        config = self.model.config
        return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)

    def layout(self, size: list[int], views: int, inputs: dict[str, Any]) -> Layout:
        """The layout of an image of a size, from the model's own packing of the numbers of its patches."""
        packed = self.packed(size, views, vision_feature_select_strategy="default")
        return tiles(packed, views, self.side)

    def packed(self, size: list[int], views: int, **how: Any) -> torch.Tensor:
        """What the model's own packing makes of the numbers of all patches, with -1 for newlines."""
        numbers = torch.arange(views * self.side**2, dtype=torch.float32).view(views, -1, 1)
        packed, _ = self.inner.pack_image_features(
            [numbers], torch.tensor([size]), image_newline=torch.tensor([-1.0]), **how
        )
        return packed[0][:, 0].round().long()


class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`: as NeXT, but many tiles and frames are blended to fewer tokens."""

    def layouts(self, inputs: dict[str, Any]) -> list[tuple[str, Layout]]:
        videos = inputs.get("pixel_values_videos")
        pooled = math.ceil(self.side / 2)
        of_videos = [
            ("video", pooled_frames(len(video), self.side, pooled)) for video in ([] if videos is None else videos)
        ]
        return super().layouts(inputs) + of_videos

    def views(self, size: list[int], number: int, inputs: dict[str, Any]) -> int:
        own = inputs.get("batch_num_images")
        if own is not None:
            several = [count != 1 for count in torch.as_tensor(own).tolist() for _ in range(count)]
            if several[number]:
                return 1
        return super().views(size, number, inputs)

    def layout(self, size: list[int], views: int, inputs: dict[str, Any]) -> Layout:
        aspect = self.model.config.vision_aspect_ratio
        packed = self.packed(size, views, vision_aspect_ratio=_ALL)
        if views == 1:
            return tiles(packed, views, self.side)
        rest = packed[self.side**2 :]
        rows = int((rest < 0).sum())
        columns = len(rest) // rows - 1
        ratio = math.sqrt(rows * columns / (int(aspect.removeprefix("anyres_max_")) * self.side**2))
        smaller = (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else None
        return tiles(packed, views, self.side, smaller)


class VideoLlava(LlavaLike):
    """`VideoLlavaForConditionalGeneration`: images, and frames of videos with their CLS, each kind with its tower."""

    towers: ClassVar[tuple[str, ...]] = ("image_tower", "video_tower")

    def layouts(self, inputs: dict[str, Any]) -> list[tuple[str, Layout]]:
        videos = inputs.get("pixel_values_videos")
        if videos is None:
            return self.plain(inputs)
        return self.plain(inputs) + [("video", frames(videos.shape[1], (self.side, self.side), True))] * len(videos)


def _first(inputs: dict[str, Any], *names: str) -> Any:
    """The first of some inputs that is given."""
    return next((inputs[name] for name in names if inputs.get(name) is not None), None)
