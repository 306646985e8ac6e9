"""Which placeholder of a prompt shows which patch of an image."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

EXTRA = -1
"""In place of a patch: a placeholder that shows none, such as a newline or CLS."""


APART = 1024
"""Rows between grids that are no neighbours: the overview and the stitched tiles, or two frames."""


@dataclass(frozen=True)
class Layout:
    """The placeholders of an image or a video in their order, int64 tensors of the host.

    Slots are the placeholders that show patches, numbered from 0: what papers count as vision tokens.

    Attributes
    ----------
    view : `[placeholders]`
        Tile or frame, a row of the encoder's batch.
    patch : `[placeholders]`
        Raster index of the patch in its view, the middle one where several are blended; `EXTRA` for an extra.
    row, column : `[placeholders]`
        Place on the image's grid, rows of frames and of the stitched tiles `APART` from others; -1 for extras, but the
        row of a newline.
    group : `[placeholders]`
        An extra stays while a patch of its group does.
    slot : `[views, patches]`
        The slot that shows each patch, -1 where none does (padding that is cut off).
    """

    view: Tensor
    patch: Tensor
    row: Tensor
    column: Tensor
    group: Tensor
    slot: Tensor

    @classmethod
    def of(
        cls, view: Tensor, patch: Tensor, row: Tensor, column: Tensor, group: Tensor, slots: tuple[int, int]
    ) -> Layout:
        """The layout in which each patch of `slots` (views, patches of each) is shown once or not at all."""
        shows = patch != EXTRA
        slot = torch.full(slots, -1)
        slot[view[shows], patch[shows]] = torch.arange(int(shows.sum()))
        return cls(view, patch, row, column, group, slot)

    @property
    def views(self) -> int:
        """Rows of the encoder's batch."""
        return len(self.slot)

    @property
    def plain(self) -> bool:
        """Whether slots are the patches of the views, all of them and in their order."""
        return torch.equal(self.slot.flatten(), torch.arange(self.slot.numel()))

    @property
    def shows(self) -> Tensor:
        """True for placeholders that show a patch, bool `[placeholders]`."""
        return self.patch != EXTRA

    @property
    def strip(self) -> bool:
        """Whether the grids are one patch high or wide."""
        row, column = (axis[self.shows] for axis in (self.row.remainder(APART), self.column))
        return not row.any() or not column.any()

    def without_extras(self) -> Layout:
        """The placeholders that show patches alone."""
        told = {name: getattr(self, name)[self.shows] for name in ("view", "patch", "row", "column", "group")}
        return replace(self, **told)


def frames(count: int, grid: tuple[int, int], cls: bool = False) -> Layout:
    """Views one after another, raster order in each, with or without a CLS in front of each."""
    patches = grid[0] * grid[1]
    patch = torch.arange(-1 if cls else 0, patches).repeat(count)
    view = torch.arange(count).repeat_interleave(patches + cls)
    row, column = _on_grid(patch, grid[1])
    return Layout.of(view, patch, _apart(row, view), column, view, (count, patches))


def pooled_frames(count: int, side: int, pooled: int) -> Layout:
    """Frames whose grid of `side` x `side` patches is blended to `pooled` x `pooled`, and one newline at the end."""
    middle, cell = blended(torch.arange(side * side).view(side, side), (pooled, pooled))
    place = torch.arange(pooled * pooled).repeat(count)
    end = torch.tensor([EXTRA])
    view = torch.arange(count).repeat_interleave(pooled * pooled)
    cells = cell.flatten() + torch.arange(count)[:, None] * pooled * pooled
    row, column = _on_grid(place, pooled)
    row, column = torch.cat([_apart(row, view), end]), torch.cat([column, end])
    patch = torch.cat([middle.flatten().repeat(count), end])
    return Layout(torch.cat([view, end + 1]), patch, row, column, torch.zeros_like(patch), cells)


def tiles(packed: Tensor, views: int, side: int, size: tuple[int, int] | None = None) -> Layout:
    """An overview, then the rows of a stitched image, each with a newline at its end.

    Parameters
    ----------
    packed : int64 `[placeholders]`
        What the model's own packing makes of the numbers of all patches, `view * side * side + patch`, and of -1 for
        the newline.
    views, side : int
        Tiles, overview included, and patches along the side of each.
    size : (rows, columns), optional
        The grid to which the stitched image is blended after this packing.
    """
    overview, rest = packed[: side * side], packed[side * side :]
    width = int((rest < 0).nonzero()[0]) + 1
    grid = rest.view(-1, width)
    shown, cell = (grid[:, :-1], None) if size is None else blended(grid[:, :-1], size)
    stitched = torch.cat([shown, grid[:1, -1:].expand(len(shown), 1)], dim=1)
    row = torch.arange(len(stitched))[:, None].expand_as(stitched).flatten()
    column = torch.arange(stitched.shape[1]).repeat(len(stitched)).masked_fill(stitched.flatten() < 0, -1)
    if width == 1:  # an image of one view has one newline, at its very end
        row = row - 1
    place = overview.remainder(side * side)
    number = torch.cat([overview, stitched.flatten()])
    view, patch = number.div(side * side, rounding_mode="floor").clamp(min=0), number.remainder(side * side)
    layout = Layout.of(
        view,
        patch.masked_fill(number < 0, EXTRA),
        torch.cat([place // side, row if width == 1 else row + APART]),
        torch.cat([place % side, column]),
        torch.cat([torch.full_like(place, 0 if width == 1 else len(stitched)), row.clamp(min=0)]),
        (views, side * side),
    )
    if cell is not None:
        slot = layout.slot.flatten()
        slot[grid[:, :-1].flatten()] = cell.flatten() + side * side
    return layout


def blended(grid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A grid of patches `[rows, columns]` that is shrunk to another size.

    The patch in the middle of each cell, int64 of the new size, and for every patch the number of its cell.
    """
    middles, cells = [], []
    for many, few in zip(grid.shape, size, strict=True):
        middles.append(((torch.arange(few) + 0.5) * many / few).long())
        cells.append(((torch.arange(many) + 0.5) * few / many).long())
    return grid[middles[0][:, None], middles[1]], cells[0][:, None] * size[1] + cells[1]


def _apart(row: Tensor, view: Tensor) -> Tensor:
    """Rows of views that are no neighbours; -1 for extras."""
    return torch.where(row < 0, row, row + view * APART)


def _on_grid(patch: Tensor, across: int) -> tuple[Tensor, Tensor]:
    """Row and column of patches in raster order on a grid of so many columns; -1 for extras."""
    return tuple(part.masked_fill(patch < 0, -1) for part in (patch // across, patch % across))
