"""InternVL's vision tower, InternViT: tiles of one size with CLS, whose patches are made units of by pixel shuffle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava.model.hosted.base import BLOCK_HOOKS, OneLayerHost, current_of
from llava.model.hosted.towers.attention import Rotary
from llava.model.hosted.towers.units import Group, UnitTower
from mustdrop.hooks import VisionTokens


@dataclass(frozen=True)
class InternBlock:
    """A block of such a tower: layer scale, norms of queries and keys over all heads, no rotary embedding."""

    module: nn.Module

    @property
    def scale(self) -> float:
        return self.module.attention.scale

    def queries(self, states: Tensor, rotary: Rotary | None) -> Tensor:
        attention = self.module.attention
        return self._by_head(attention.q_norm(attention.q_proj(self.module.layernorm_before(states))))

    def keys(self, states: Tensor, rotary: Rotary | None) -> Tensor:
        attention = self.module.attention
        return self._by_head(attention.k_norm(attention.k_proj(self.module.layernorm_before(states))))

    def queries_keys_values(self, states: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        attention, states = self.module.attention, self.module.layernorm_before(states)
        query, key = attention.q_norm(attention.q_proj(states)), attention.k_norm(attention.k_proj(states))
        return self._by_head(query), self._by_head(key), self._by_head(attention.v_proj(states))

    def attended(self, states: Tensor, seen: Tensor) -> Tensor:
        attention = self.module.attention
        added = attention.projection_dropout(attention.projection_layer(seen.transpose(1, 2).flatten(2)))
        return states + self.module.lambda_1 * added

    def with_mlp(self, states: Tensor) -> Tensor:
        added = self.module.dropout(self.module.mlp(self.module.layernorm_after(states)))
        return states + self.module.lambda_2 * added

    def _by_head(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.module.attention.num_heads, -1)).transpose(1, 2)


def forward(host: OneLayerHost, tower: nn.Module, stock: Callable, pixel_values: Tensor, **kwargs: Any) -> Any:
    """A tower's forward: our loop up to the one hidden state that is asked for, where a reducer works in the tower.

    `pixel_values` are `[tiles, 3, height, width]`.
    """
    current = current_of(host)
    if current is None:
        return stock(pixel_values, **kwargs)
    with current.state.timed("vision", pixel_values.device):
        if not any(map(current.state.overrides, BLOCK_HOOKS)):
            return stock(pixel_values, **kwargs)
        layer = host.asked_layer(kwargs.get("output_hidden_states"), current.state.reducer)
        views = current.views(len(pixel_values))
        states = tower.embeddings(pixel_values)
        blocks = tower.encoder.layer[: layer % (len(tower.encoder.layer) + 1)]
        group = group_of(host.grid(pixel_values), host.merge, views, states.device)
        call = UnitTower(current.state, [InternBlock(block) for block in blocks], host.merge**2, [group])
        for block in blocks:
            states = block(states, units=call)
        current.towers.append(call.result())
        return BaseModelOutputWithPooling(last_hidden_state=tower.layernorm(states), hidden_states={layer: states})


def block(index: int, module: nn.Module, stock: Callable, states: Tensor, units: UnitTower | None = None) -> Tensor:
    """A block's forward on `[tiles, 1 + patches, width]`: part of a call, if it is given one."""
    if units is None:
        return stock(states)
    return units.run(
        index,
        states,
        stock,
        lambda states: states + module.lambda_1 * module.attention(module.layernorm_before(states))[0],
    )


def group_of(grid: tuple[int, int], merge: int, views: list[int], device: torch.device) -> Group:
    """The tiles of a call, of so many rows and columns of units each; `views` are how many show one image each."""
    rows, columns = grid
    tiles, length = sum(views), 1 + rows * columns * merge**2
    raster = torch.arange(1, length, device=device).view(rows, merge, columns, merge)
    inside = torch.cat([raster.new_zeros(1), raster.transpose(1, 2).flatten()])  # CLS, then unit by unit
    place = torch.arange(tiles, device=device)[:, None] * length + inside
    hidden = torch.empty(tiles, 1 + rows * columns, 0, device=device)
    tokens = VisionTokens.from_patches(hidden, (rows, columns), 1, views)
    return Group(tokens, list(range(tiles)), place)
