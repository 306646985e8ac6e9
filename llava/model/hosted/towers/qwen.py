"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: all images in one packed sequence of merger units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llava.model.hosted.base import BLOCK_HOOKS, Host, Pass, current_of
from llava.model.hosted.towers.attention import Rotary, Windows
from llava.model.hosted.towers.units import Group, UnitTower
from llava.model.language_model.projections import Part, turned
from mustdrop.hooks import VisionTokens


@dataclass(frozen=True)
class QwenBlock:
    """A block of such a tower: fused projections, rotary embedding in float32."""

    module: nn.Module

    @property
    def scale(self) -> float:
        return self.module.attn.scaling

    def queries(self, states: Tensor, rotary: Rotary) -> Tensor:
        return self._turned(self._part(0, states), rotary)

    def keys(self, states: Tensor, rotary: Rotary) -> Tensor:
        return self._turned(self._part(1, states), rotary)

    def queries_keys_values(self, states: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.module.attn.qkv(self.module.norm1(states)).chunk(3, dim=-1)
        query, key, value = map(self._by_head, parts)
        return self._turned(query, rotary), self._turned(key, rotary), value

    def attended(self, states: Tensor, seen: Tensor) -> Tensor:
        return states + self.module.attn.proj(seen.transpose(1, 2).flatten(2))

    def with_mlp(self, states: Tensor) -> Tensor:
        return states + self.module.mlp(self.module.norm2(states))

    def _part(self, number: int, states: Tensor) -> Tensor:
        linear, width = self.module.attn.qkv, states.shape[-1]
        return self._by_head(Part(linear, number * width, (number + 1) * width)(self.module.norm1(states)))

    def _by_head(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.module.attn.num_heads, -1)).transpose(1, 2)

    @staticmethod
    def _turned(states: Tensor, rotary: Rotary) -> Tensor:
        cos, sin = (table[:, None].float() for table in rotary)
        return turned(states.float(), cos, sin).to(states.dtype)


def forward(host: Host, tower: nn.Module, stock: Callable, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any):
    """A tower's forward: the stock one, whose blocks find the call that they belong to among their arguments.

    `hidden_states` are the pixels of all patches, `grid_thw` int64 `[images, 3]` frames, rows and columns of patches.
    """
    current = current_of(host)
    if current is None:
        return stock(hidden_states, grid_thw=grid_thw, **kwargs)
    sizes = [tuple(size) for size in grid_thw.tolist()]
    host.check_images(current.state.reducer, sizes)
    with current.state.timed("vision", hidden_states.device):
        if not any(map(current.state.overrides, BLOCK_HOOKS)):
            return stock(hidden_states, grid_thw=grid_thw, **kwargs)
        return _run(tower, current, stock, hidden_states, grid_thw, sizes, kwargs)


def _run(tower: nn.Module, current: Pass, stock: Callable, pixels: Tensor, grid_thw: Tensor, sizes, kwargs):
    blocks, unit = [QwenBlock(block) for block in tower.blocks], tower.spatial_merge_size**2
    groups = groups_of(tower, sizes, pixels.device)
    call = UnitTower(
        current.state,
        blocks,
        unit,
        groups,
        windowed=current.host.windowed,
        needed=frozenset(getattr(tower, "deepstack_visual_indexes", ())),
    )
    output = stock(pixels, grid_thw=grid_thw, units=call, **kwargs)
    current.towers.append(call.result())
    return output


def block(
    index: int, module: nn.Module, stock: Callable, states: Tensor, *args: Any, units: UnitTower | None = None, **kwargs
) -> Tensor:
    """A block's forward on packed patches `[patches, width]`: part of a call, if it is given one."""
    if units is None:
        return stock(states, *args, **kwargs)
    if not index:
        units.turn(kwargs["position_embeddings"])
    return units.run(
        index,
        states,
        lambda states: stock(states, *args, **kwargs),
        lambda states: states + module.attn(module.norm1(states), *args, **kwargs),
    )


def groups_of(tower: nn.Module, sizes: Sequence[tuple[int, int, int]], device: torch.device) -> list[Group]:
    """The frames of images of these sizes (frames, rows and columns of patches), those with equal grids together."""
    merge = tower.spatial_merge_size
    unit = merge**2
    side = _window_side(tower)
    views: dict[tuple[int, int], list[int]] = {}
    first: dict[tuple[int, int], list[int]] = {}
    frames_of: dict[tuple[int, int], list[int]] = {}
    number = patch = 0
    for frames, rows, columns in sizes:
        grid = rows // merge, columns // merge
        frames_of.setdefault(grid, []).append(frames)
        for _ in range(frames):
            views.setdefault(grid, []).append(number)
            first.setdefault(grid, []).append(patch)
            number, patch = number + 1, patch + rows * columns
    groups = [_group(grid, views[grid], first[grid], unit, side, len(views) == 1, device) for grid in views]
    for group in groups:  # a reducer's numbers are those of an image or video, all its views together
        group.tokens = replace(group.tokens, together=tuple(frames_of[group.tokens.grid]))
    return groups


def _window_side(tower: nn.Module) -> int | None:
    """Units along the side of a window, None for a tower without windows."""
    if not hasattr(tower, "window_size"):
        return None
    return tower.window_size // tower.spatial_merge_size // tower.patch_size


def _group(
    grid: tuple[int, int],
    views: list[int],
    first: list[int],
    unit: int,
    side: int | None,
    alone: bool,
    device: torch.device,
) -> Group:
    """Views of one grid, whose patches begin at `first`; in a tower with windows these come one after another."""
    units = grid[0] * grid[1]
    windows = None if side is None else Windows.of(grid, side)
    place = None
    if not alone or windows is not None:
        at = torch.arange(units) if windows is None else windows.order().argsort()
        inside = (at[:, None] * unit + torch.arange(unit)).flatten()
        place = (torch.tensor(first)[:, None] + inside).to(device)
    hidden = torch.empty(len(views), units, 0, device=device)
    return Group(VisionTokens.from_patches(hidden, grid, prefix=0), views, place, None, windows and windows.to(device))
