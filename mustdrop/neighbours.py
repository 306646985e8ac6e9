"""The text rows and the vision rows of prompts apart, each with the keys it may see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mustdrop.tokens import Tokens, compact

BLOCK = 96
"""Vision rows that share their keys: with more, fewer keys are copied; with fewer, less is computed in vain."""

ROWS = 256
"""Rows whose probabilities are held at a time, where a softmax counts keys whose values do not."""

_SHIFT = 20  # bits of a row or column number
_OFF_GRID = 1 << 12  # how far tokens without a place lie above the grid
_ORIGIN = 1 << 14  # makes their numbers positive


def causal_blocks(length: int) -> list[tuple[int, int]]:
    """First and last row, exclusive, of each block of `ROWS`; its keys are those up to its last row."""
    return [(start, min(start + ROWS, length)) for start in range(0, length, ROWS)]


@dataclass
class SplitRows:
    """Which rows of a batch of prompts are text, and what they attend to.

    Attributes
    ----------
    text : int64 `[batch, text]`
        Columns of the text tokens, padded on the left.
    real : bool `[batch, text]`
        False for that padding.
    sees : bool `[batch, 1, text, length]`
        Keys of each text row: everything up to itself.
    vision : bool `[batch, length]`
        True for vision tokens.
    causal : bool `[batch, 1, length, length]` or None
        Keys of all rows, if none has a window and there is padding.
    window : Window or None
        What vision rows attend to, if that is not everything up to themselves.
    """

    text: Tensor
    real: Tensor
    sees: Tensor
    vision: Tensor
    causal: Tensor | None = None
    window: Window | None = None

    @classmethod
    def of(cls, tokens: Tokens, window: int | None = None) -> SplitRows | None:
        """Split the rows of a record; None if no token is a vision token. Synchronises with the host.

        Parameters
        ----------
        tokens : Tokens
            What the rows are; with a window, `row` and `column` are needed.
        window : int, optional
            Side of the square of patches that a vision token attends to.
        """
        if not tokens.vision.any():
            return None
        column = torch.arange(tokens.vision.shape[1], device=tokens.vision.device)
        valid = torch.ones_like(tokens.vision) if tokens.valid is None else tokens.valid
        is_text = valid & ~tokens.vision
        text, real = compact(is_text)
        real = torch.ones_like(text, dtype=torch.bool) if real is None else real

        def up_to(rows: Tensor) -> Tensor:
            return ((valid[:, None] & (column <= rows[..., None])) | (column == rows[..., None]))[:, None]

        if window is not None:
            near = Window.of(tokens, is_text, text.shape[1], window)
            return cls(text, real, up_to(text), tokens.vision, window=near)
        return cls(text, real, up_to(text), tokens.vision, None if tokens.valid is None else up_to(column[None]))

    def pairs(self, row: int = 0) -> int:
        """Pairs of a vision row and a key that one head computes for a prompt."""
        if self.window is None:
            return int(self.vision[row].sum()) * self.vision.shape[1]
        blocks, rows, keys = self.window.sees.shape[1:]
        return blocks * rows * keys


@dataclass
class Window:
    """What vision rows attend to on the patch grid, in blocks of rows for batched dense attention.

    They see the text before them and the tokens of their own image that sit at most `(window - 1) / 2` rows and columns
    away, before or after them. In raster order the grid rows within reach of a block are a run of neighbours; its keys
    are that run and the text before the last image.

    Attributes
    ----------
    queries : int64 `[batch, blocks * rows]`
        Columns of the vision tokens in raster order; what follows the last one is padding.
    keys : int64 `[batch, blocks * keys]`
        Columns of the keys of each block.
    sees : bool `[batch, blocks, rows, keys]`
        Which of its block's keys a row sees; padding sees all.
    slot : int64 `[batch, length]`
        For every column, where it is in text rows and `queries` one after another; 0 for padding.
    """

    queries: Tensor
    keys: Tensor
    sees: Tensor
    slot: Tensor

    @classmethod
    def of(cls, tokens: Tokens, is_text: Tensor, text: int, window: int, block: int = BLOCK) -> Window:
        """Find the neighbours of all vision tokens; `text` is the number of text rows, `block` that of a block."""
        vision = tokens.vision
        count = vision.sum(-1, keepdim=True)
        rows = min(block, most := int(count.max()))
        blocks = -(-most // rows)
        column = torch.arange(vision.shape[1], device=vision.device)

        placed = tokens.row >= 0
        line = (tokens.image << _SHIFT) + tokens.row.masked_fill(~placed, -_OFF_GRID) + _ORIGIN
        place = tokens.column.masked_fill(~placed, -_OFF_GRID) + _ORIGIN
        raster = ((line << _SHIFT) + place).masked_fill(~vision, torch.iinfo(line.dtype).max)
        ranked = raster.argsort(dim=-1, stable=True)
        number = torch.arange(blocks * rows, device=vision.device)
        queries, exists = ranked[:, number.clamp(max=len(column) - 1)], number < count
        line, place = line.gather(1, queries), place.gather(1, queries)

        first = line[:, ::rows].contiguous()
        last = line.masked_fill(~exists, -1).unflatten(1, (blocks, rows)).amax(-1)
        ordered = line.masked_fill(~exists, torch.iinfo(line.dtype).max)
        start = torch.searchsorted(ordered, first - window // 2)
        stop = torch.searchsorted(ordered, last + window // 2, right=True).maximum(start)
        run = start[..., None] + torch.arange(int((stop - start).max()), device=vision.device)
        near = run.clamp(max=len(number) - 1).flatten(1)

        def apart(values: Tensor) -> Tensor:
            """Distances between the rows of each block and its keys, `[batch, blocks, rows, run]`."""
            values = values.gather(1, near).view(len(values), blocks, 1, -1), values.view(len(values), blocks, rows, 1)
            return (values[0] - values[1]).abs()

        seen = torch.maximum(apart(line), apart(place)) <= window // 2
        seen &= (run < stop[..., None])[:, :, None]
        before = is_text & (column < (vision * (column + 1)).amax(-1, keepdim=True))
        prefix, real = compact(before)
        real = torch.ones_like(prefix, dtype=torch.bool) if real is None else real
        earlier = real[:, None] & (prefix[:, None] < queries[..., None])
        earlier = earlier.unflatten(1, (blocks, rows))
        keys = [prefix[:, None].expand(-1, blocks, -1), queries.gather(1, near).unflatten(1, (blocks, -1))]
        sees = torch.cat([earlier, seen], dim=-1) | ~exists.view(-1, blocks, rows, 1)

        rank = torch.empty_like(ranked).scatter_(1, ranked, column.expand_as(ranked))
        of_text = is_text.cumsum(-1) - 1 + text - is_text.sum(-1, keepdim=True)
        slot = torch.where(vision, text + rank, of_text.masked_fill(~is_text, 0))
        return cls(queries, torch.cat(keys, dim=-1).flatten(1), sees, slot)
