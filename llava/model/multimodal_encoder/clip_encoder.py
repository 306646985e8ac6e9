"""CLIP vision tower with its own loop over encoder blocks, where vision tokens can be merged, dropped and chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model.masks import attention_mask
from mustdrop.hooks import Attention, ForwardState, Reducer, VisionStep, VisionTokens, gather


class CLIPVisionTower(nn.Module):
    """A CLIP ViT of any size whose features come from one of its hidden states.

    Parameters
    ----------
    config : CLIPVisionConfig
        Shape of the ViT.
    select_layer : int
        Hidden state that gives the features, as in `hidden_states[select_layer]`: -2 is the input of the last block,
        which is then never run.
    select_feature : {"patch", "cls_patch"}
        Whether the CLS token is part of the features.

    Raises
    ------
    ValueError
        If `select_feature` or `select_layer` is not one the tower can give.
    """

    def __init__(self, config: CLIPVisionConfig, select_layer: int = -2, select_feature: str = "patch"):
        super().__init__()
        self._select(config.num_hidden_layers, select_layer, select_feature)
        self.vision_tower = CLIPVisionModel(config)

    @classmethod
    def around(cls, module: nn.Module, select_layer: int) -> CLIPVisionTower:
        """The same loop over the blocks of a loaded CLIP or SigLIP tower, whose CLS token (CLIP) stays in front."""
        tower = cls.__new__(cls)
        super(cls, tower).__init__()
        tower._select(module.config.num_hidden_layers, select_layer, "cls_patch")
        tower.vision_tower = module
        return tower

    def _select(self, depth: int, select_layer: int, select_feature: str) -> None:
        """Note which state gives the features."""
        if select_feature not in ("patch", "cls_patch"):
            raise ValueError(f"mm_vision_select_feature is {select_feature!r}: it must be 'patch' or 'cls_patch'")
        if not -depth - 1 <= select_layer <= depth:
            raise ValueError(f"mm_vision_select_layer is {select_layer}: a ViT of {depth} blocks has no such state")
        self.select_layer = select_layer
        self.select_feature = select_feature
        self.blocks_run = select_layer % (depth + 1)
        self.image_processor = None
        self.is_loaded = True

    def encode(
        self, images: Tensor, state: ForwardState | None = None, views: Sequence[int] | None = None
    ) -> VisionTokens:
        """Features of every image and where each of them comes from.

        Parameters
        ----------
        images : `[images, 3, height, width]`
            Preprocessed pixels.
        state : ForwardState, optional
            The forward pass this belongs to; without one nothing is reduced.
        views : sequence of int, optional
            How many neighbouring rows are the tiles or frames of one image. Default: every row is an image.

        Returns
        -------
        VisionTokens
            `hidden` `[images, tokens, width]`; `prefix` is 1 if the CLS token is part of the features, else 0.
        """
        state = state or ForwardState(Reducer())
        model = self.vision_tower
        patches = model.embeddings.patch_embedding
        images = images.to(patches.weight.dtype)
        if patches.weight.device.type != "meta":  # else the weights come to where the images are
            images = images.to(patches.weight.device)
        images = state.pixels(images, patches.stride[0], views)
        grid = tuple(size // patches.stride[0] for size in images.shape[-2:])
        hidden = model.embeddings(images, interpolate_pos_encoding=grid != self._native_grid)
        if hasattr(model, "pre_layrnorm"):  # CLIP; SigLIP has neither this nor CLS
            hidden = model.pre_layrnorm(hidden)
        tokens = VisionTokens.from_patches(hidden, grid, hidden.shape[1] - grid[0] * grid[1], views)
        mask = None
        for index, block in enumerate(model.encoder.layers[: self.blocks_run]):
            before = tokens
            if state.overrides("inside_vision_block"):
                tokens = self._run_in_two(index, tokens, mask, state)
            else:
                tokens = tokens.with_hidden(block(tokens.hidden, attention_mask=mask))
            if state.overrides("after_vision_block"):
                tokens = state.choose("after_vision_block", self._step(index, before, tokens))
            if tokens.patch_to_token is not before.patch_to_token:
                mask = self._mask(tokens, state)
                state.vision[index] = tokens.patch_to_token
        tokens = state.choose("on_vision_features", VisionStep(tokens))
        return tokens if self.select_feature == "cls_patch" else tokens.without_prefix()

    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Plain features `[images, tokens, width]` in the images' dtype; a list of images gives a list."""
        if isinstance(images, list):
            return [self(image[None]) for image in images]
        return self.encode(images).hidden.to(images.dtype)

    def _run_in_two(self, index: int, tokens: VisionTokens, mask, state: ForwardState) -> VisionTokens:
        """A block whose tokens may be merged or dropped between attention and MLP."""
        block = self.vision_tower.encoder.layers[index]
        attended = tokens.hidden + block.self_attn(block.layer_norm1(tokens.hidden), attention_mask=mask)[0]
        step = replace(self._step(index, tokens, tokens.with_hidden(attended)), next_attention=None)
        tokens = state.choose("inside_vision_block", step)
        return tokens.with_hidden(tokens.hidden + block.mlp(block.layer_norm2(tokens.hidden)))

    def _step(self, index: int, before: VisionTokens, tokens: VisionTokens) -> VisionStep:
        blocks = self.vision_tower.encoder.layers
        following = self._attention(index + 1, tokens) if index + 1 < len(blocks) else None
        return VisionStep(
            tokens,
            block=index,
            blocks=len(blocks),
            run=self.blocks_run,
            attention=self._attention(index, before),
            next_attention=following,
        )

    def _attention(self, index: int, tokens: VisionTokens) -> Attention:
        """Attention of a block on given input tokens, on demand; rows and columns count the prefix."""
        block = self.vision_tower.encoder.layers[index]
        attention = block.self_attn

        def project(linear: nn.Linear, hidden: Tensor) -> Tensor:
            return rearrange(linear(block.layer_norm1(hidden)), "b n (h d) -> b h n d", h=attention.num_heads)

        return Attention(
            queries=lambda rows: project(attention.q_proj, gather(tokens.hidden, rows)),
            keys=lambda: project(attention.k_proj, tokens.hidden),
            scale=attention.scale,
            valid=tokens.valid_with_prefix,
        )

    def _mask(self, tokens: VisionTokens, state: ForwardState):
        if state.any("proportional_attention"):
            return self._bias(tokens)
        if tokens.valid is None:
            return None
        keys = tokens.hidden.shape[1]
        return attention_mask(self.config, tokens.hidden, valid=tokens.valid_with_prefix, keys=keys, causal=False)

    def _bias(self, tokens: VisionTokens) -> Tensor:
        """Mask that makes attention count a token as often as it has patches, `[images, 1, 1, keys]`."""
        bias = F.pad(tokens.size.clamp(min=1).to(tokens.hidden.dtype).log(), (tokens.prefix, 0))
        if tokens.valid is not None:
            bias = bias.masked_fill(~tokens.valid_with_prefix, torch.finfo(bias.dtype).min)
        return bias[:, None, None]

    @property
    def _native_grid(self) -> tuple[int, int]:
        return (self.num_patches_per_side,) * 2

    @property
    def config(self) -> CLIPVisionConfig:
        return self.vision_tower.config

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2
