"""Rotary positions of prompts whose images keep fewer tokens than they have patches.

An engine numbers the tokens of a prompt 0..n-1. A model that was trained on whole images expects a token where its
patch was, and the text after an image behind all of its patches. What it needs fits into three rows of positions: the
position, where the token's image begins (the token's own place for text), and the place behind the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POSITIONS = ("original", "spread", "renumber")
"""Of an image's tokens: those of their patches; evenly over the image's place, so that the text after it keeps its own;
or 0..n-1 through the prompt."""

COLUMNS, BASE = 2, 128
"""A position travels with an embedding, as `BASE * high + low`: bfloat16 holds whole numbers up to 256."""


@dataclass(frozen=True)
class Room:
    """What an image takes of a prompt: `tokens`, and the `span` of rotary positions that it had without a reducer."""

    tokens: int
    span: int

    def spread(self, tokens: int) -> list[int]:
        """Places for so many tokens, evenly over the span, counted from its first."""
        return [(2 * number + 1) * self.span // (2 * tokens) for number in range(tokens)]


def in_full(length: int, images: Sequence[tuple[int, int, Room]]) -> tuple[Tensor, int]:
    """Positions as if nothing had been dropped, image tokens evenly over their image's place.

    Parameters
    ----------
    length : int
        Tokens of the prompt.
    images : sequence of (int, int, Room)
        In order: where each begins in the prompt, the tokens it takes there, and its room.

    Returns
    -------
    (Tensor, int)
        int64 `[3, length]`, the three rows; and what to add to the number of a token that is generated.
    """
    position, begins, cursor, place = [], [], 0, 0
    for at, tokens, room in images:
        text = range(place, place + at - cursor)
        place = text.stop
        position += [*text, *(place + one for one in room.spread(tokens))]
        begins += [*text, *[place] * tokens]
        place, cursor = place + max(room.span, tokens), at + tokens
    text = range(place, place + length - cursor)
    rows = [*position, *text], [*begins, *text], [text.stop] * length
    return torch.tensor(rows), text.stop - length


def as_columns(position: Tensor) -> Tensor:
    """Positions int64 `[tokens]` as `[tokens, COLUMNS]` that fit any floating-point type."""
    return torch.stack([position // BASE, position % BASE], dim=-1)


def as_told(positions: Tensor, shown: Tensor, computed: int, told: Tensor) -> tuple[Tensor, int]:
    """Positions with those that image tokens have brought along.

    Parameters
    ----------
    positions : int64 `[3, length]`
        As `in_full` made them, or this function.
    shown : bool `[length]`
        True for tokens of images.
    computed : int
        Tokens that were computed before; of those after them the first `len(told)` that show images are concerned.
    told : `[tokens, COLUMNS]`
        What `as_columns` made of their positions, counted from their image's first patch.

    Returns
    -------
    (Tensor, int)
        As `in_full` returns them; a copy.
    """
    told = told.to(positions.device).long()
    columns = shown[computed:].nonzero()[: len(told), 0] + computed
    positions = positions.clone()
    positions[0, columns] = positions[1, columns] + told[:, 0] * BASE + told[:, 1]
    return positions, behind(positions)


def behind(positions: Tensor) -> int:
    """What to add to the number of a token that is generated after a prompt with these three rows."""
    return int(positions[2, 0]) - positions.shape[1]
