"""Attention of towers whose tokens are units of several patches: dense, in windows, and on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.model.hosted.tokens import placed
from mustdrop.hooks import Attention, VisionTokens, gather

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of patches, each `[views or 1, patches, head_dim]`."""

AT_ONCE = 1 << 26
"""Attention probabilities that are held at a time."""


def folded(states: Tensor, prefix: int, unit: int) -> Tensor:
    """Patches `[views, prefix + units * unit, width]` as units `[views, prefix + units, unit * width]`.

    A prefix token is as wide as a unit: it stands there as often as a unit has patches.
    """
    units = states[:, prefix:].unflatten(1, (-1, unit)).flatten(2)
    return units if not prefix else torch.cat([states[:, :prefix].repeat(1, 1, unit), units], dim=1)


def unfolded(hidden: Tensor, prefix: int, unit: int) -> Tensor:
    """The reverse of `folded`."""
    width = hidden.shape[-1] // unit
    patches = hidden[:, prefix:].unflatten(-1, (unit, width)).flatten(1, 2)
    return patches if not prefix else torch.cat([hidden[:, :prefix, :width], patches], dim=1)


def of_patches(units: Tensor, prefix: int, unit: int) -> Tensor:
    """Numbers of prefix tokens and units `[views, rows]` as numbers of their patches `[views, rows * unit]`.

    A prefix token comes as often as a unit has patches.
    """
    inside = torch.arange(unit, device=units.device)
    first = units[..., None] * unit - prefix * (unit - 1)
    return torch.where(units[..., None] < prefix, units[..., None], first + inside).flatten(1)


@dataclass(frozen=True)
class Windows:
    """Square windows of a grid of units, those at the rim smaller.

    Attributes
    ----------
    number : int64 `[units]`
        The window that a unit is in.
    slots : int64 `[windows, size]`
        The units of a window, -1 where it has fewer.
    slot : int64 `[units]`
        Where a unit is in the flattened `slots`.
    """

    number: Tensor
    slots: Tensor
    slot: Tensor

    @classmethod
    def of(cls, grid: tuple[int, int], side: int) -> Windows:
        """Windows of `side` x `side` units, on the host."""
        row, column = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
        number = row // side * -(-grid[1] // side) + column // side
        slot = number * side**2 + row % side * side + column % side
        slots = torch.full((int(number.max()) + 1, side**2), -1)
        slots.view(-1)[slot] = torch.arange(len(number))
        return cls(number, slots, slot)

    def to(self, device: torch.device) -> Windows:
        """The same on a device."""
        return Windows(self.number.to(device), self.slots.to(device), self.slot.to(device))

    def order(self) -> Tensor:
        """Units window by window, int64 `[units]`."""
        return self.slots[self.slots >= 0]

    def hides(self, tokens: VisionTokens, unit: int, rows: Tensor) -> Tensor:
        """True for the patches that these rows `[views, rows]` of patches do not see, bool `[views, rows, patches]`."""
        own = self.number[tokens.patch_index].repeat_interleave(unit, dim=-1)
        return own.gather(1, rows)[..., None] != own[:, None]


def key_bias(tokens: VisionTokens, unit: int, proportional: bool, dtype: torch.dtype) -> Tensor | None:
    """What every key adds to its scores `[views, 1, 1, keys]`, None where nothing is to be said.

    Padding is hidden; with proportional attention a token counts as often as the patches it stands for.
    """
    if tokens.valid is None and not proportional:
        return None
    bias = torch.zeros_like(tokens.patch_index, dtype=dtype)
    if proportional:
        bias = tokens.size.clamp(min=1).to(dtype).log()
    if tokens.valid is not None:
        bias = bias.masked_fill(~tokens.valid, torch.finfo(dtype).min)
    return F.pad(bias.repeat_interleave(unit, dim=-1), (tokens.prefix, 0))[:, None, None]


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Outputs of all heads `[views, heads, patches, head_dim]`; every patch sees every other one of its view."""
    return F.scaled_dot_product_attention(query, key, value, bias, scale=scale)


def attend_in_windows(
    parts: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    scale: float,
    windows: Windows,
    tokens: VisionTokens,
    unit: int,
) -> Tensor:
    """The same where a patch sees its window alone: queries, keys and values `[views, heads, patches, head_dim]`.

    All windows are padded to their full size, whatever is left of them, and computed together.
    """
    views, heads, patches, _ = parts[0].shape
    column = placed(tokens)
    column = torch.where(windows.slots < 0, -1, column[:, windows.slots.clamp(min=0)])  # [views, windows, size]
    real = (column >= 0).repeat_interleave(unit, dim=-1).flatten(0, 1)
    rows = of_patches(column.clamp(min=0).flatten(1), 0, unit)
    least = torch.finfo(parts[0].dtype).min
    mask = torch.zeros_like(real, dtype=parts[0].dtype)
    if bias is not None:
        mask = bias[:, 0, 0].to(mask.dtype).gather(1, rows).view_as(mask)
    mask = mask.masked_fill(~real, least)[:, None, None]

    def in_windows(states: Tensor) -> Tensor:
        picked = gather(states.transpose(1, 2), rows).unflatten(1, (len(windows.slots), -1))
        return picked.flatten(0, 1).transpose(1, 2)

    seen = F.scaled_dot_product_attention(*map(in_windows, parts), mask, scale=scale)
    seen = seen.transpose(1, 2).reshape(views, -1, heads, seen.shape[-1])
    back = of_patches(windows.slot[tokens.patch_index], 0, unit)
    return gather(seen, back).transpose(1, 2)


class UnitAttention(Attention):
    """Attention between units: the mean over the patches of the asking one, the sum over those of the asked one.

    `keys` are what units are compared by: the mean over a unit's patches.

    Parameters
    ----------
    patches : Attention
        Between the patches, with the prefix in front.
    prefix, unit : int
        Tokens that are no units, and patches of a unit.
    """

    def __init__(self, patches: Attention, prefix: int, unit: int):
        patches.keys = cache(patches.keys)
        self.patches, self.prefix, self.unit = patches, prefix, unit
        super().__init__(patches.queries, self._unit_keys, patches.scale)

    def probabilities(self, rows: Tensor) -> Tensor:
        return torch.cat(self._parts(rows, lambda found: found), dim=2)

    def mean_over_heads(self, rows: Tensor) -> Tensor:
        return torch.cat(self._parts(rows, lambda found: found.mean(1)), dim=1)

    def _parts(self, rows: Tensor, change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The probabilities of some rows at a time, changed: all of them would not fit where images are large."""
        batch, heads, columns, _ = self.patches.keys().shape
        each = max(1, AT_ONCE // (batch * heads * columns * self.unit))
        return [change(self._of_units(part)) for part in rows.split(each, dim=1)]

    def _of_units(self, rows: Tensor) -> Tensor:
        found = self.patches.probabilities(of_patches(rows, self.prefix, self.unit))
        asked = found[..., self.prefix :].unflatten(-1, (-1, self.unit)).sum(-1)
        asked = torch.cat([found[..., : self.prefix], asked], dim=-1) if self.prefix else asked
        return asked.unflatten(-2, (-1, self.unit)).mean(-2)

    def _unit_keys(self) -> Tensor:
        keys = self.patches.keys()
        units = keys[:, :, self.prefix :].unflatten(2, (-1, self.unit)).mean(3)
        return torch.cat([keys[:, :, : self.prefix], units], dim=2) if self.prefix else units
