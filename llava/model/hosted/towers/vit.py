"""CLIP and SigLIP towers of transformers, run by our loop over their blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava.model.hosted.base import OneLayerHost, TowerRun, current_of
from llava.model.hosted.tokens import placed, untouched
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from mustdrop.hooks import ForwardState, VisionTokens


def forward(host: OneLayerHost, tower: nn.Module, stock: Callable, pixel_values: Tensor, **kwargs: Any) -> Any:
    """A vision tower's forward: our loop up to the one hidden state that is asked for."""
    current = current_of(host)
    if current is None:
        return stock(pixel_values, **kwargs)
    layer = host.asked_layer(kwargs.get("output_hidden_states"), current.state.reducer)
    if not isinstance(layer, int):
        return stock(pixel_values, **kwargs)
    views = current.views(len(pixel_values))
    run, states = run_tower(CLIPVisionTower.around(tower, layer), pixel_values, current.state, views)
    current.towers.append(run)
    return BaseModelOutputWithPooling(hidden_states={layer: states})


def run_tower(
    tower: CLIPVisionTower, pixels: Tensor, state: ForwardState, views: Sequence[int] | None = None
) -> tuple[TowerRun, Tensor]:
    """What is left of the views, and the states in full layout that the stock code goes on with.

    `pixels` `[rows, 3, height, width]`, of which `views` neighbouring ones show one image each; the states are
    `[rows, prefix + patches, width]`.
    """
    with state.timed("vision", pixels.device):
        tokens = tower.encode(pixels, state, views)
        maps, state.vision = state.vision, {}
        return TowerRun.of(tokens.without_prefix(), maps), full_layout(tokens)


def full_layout(tokens: VisionTokens) -> Tensor:
    """A state for every patch, `[views, prefix + patches, width]`.

    A token's own patch has its state, a merged one that of the token it went into; what was dropped has that of the
    nearest token on the grid, so that packing which blends neighbours blends tokens that are there.
    """
    if untouched(tokens):
        return tokens.hidden
    column = tokens.patch_to_token
    column = torch.where(column < 0, _nearest(tokens), column)
    own = placed(tokens)
    column = torch.where(own < 0, column, own)
    prefix = torch.arange(tokens.prefix, device=column.device).expand(len(column), -1)
    column = torch.cat([prefix, column + tokens.prefix], dim=1)
    return tokens.hidden.gather(1, column[..., None].expand(-1, -1, tokens.hidden.shape[-1]))


def _nearest(tokens: VisionTokens) -> Tensor:
    """For every patch the column of the token that sits nearest to it, int64 `[views, patches]`."""
    across = tokens.grid[1]
    patch = torch.arange(tokens.patch_to_token.shape[1], device=tokens.hidden.device)

    def apart(of: Tensor, at: Tensor) -> Tensor:
        return (of[:, None] - at[:, None, :]).square()

    place = tokens.patch_index
    distance = apart(patch // across, place // across) + apart(patch % across, place % across)
    if tokens.valid is not None:
        distance = distance.masked_fill(~tokens.valid[:, None], torch.iinfo(distance.dtype).max)
    return distance.argmin(-1)
