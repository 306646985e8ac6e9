"""Reducers made of reducers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mustdrop.hooks import Reducer
from mustdrop.reach import TOUCHED, Touch, Tower, check_counts, check_steps, square


class Compose(Reducer):
    """Several reducers at work in one pass, in the given order.

    In the vision encoder each sees what the one before it left. In the decoder all of them see the same layer, and a
    token goes on only if all of them keep it. Each has a scratch of its own.

    Parameters
    ----------
    parts : sequence of Reducer
        The reducers.
    positions, decode_positions : str
        As for any reducer; valid for the whole.
    """

    def __init__(self, parts: Sequence[Reducer], positions: str = "original", decode_positions: str = "continue"):
        self.parts = tuple(parts)
        self.positions = positions
        self.decode_positions = decode_positions
        self.tile_order = next((part.tile_order for part in self.parts if part.tile_order != "model"), "model")
        self.needs_tiles = any(part.needs_tiles for part in self.parts)

    def flat(self) -> list[Reducer]:
        """The parts, and in place of compositions their parts."""
        return [one for part in self.parts for one in (part.flat() if isinstance(part, Compose) else [part])]

    def check(self, layers: int, blocks: int) -> None:
        for part in self.parts:
            part.check(layers, blocks)

    def check_heads(self, heads: int) -> None:
        for part in self.parts:
            part.check_heads(heads)

    def check_tower(self, tower: Tower) -> None:
        for part in self.flat():
            tower = replace(tower, grid=part.shrinks(tower.grid))
        for part in self.parts:
            part.check_tower(tower)
        check_steps(self.flat(), tower)

    def touches(self, tower: Tower) -> Touch:
        parts = [part.touches(tower) for part in self.parts]
        union = {name: frozenset().union(*(getattr(part, name) for part in parts)) for name in TOUCHED}
        return Touch(**union, needs_all=any(part.needs_all for part in parts))

    def check_tokens(self, layers: int, tokens: int) -> None:
        check_counts(self.flat(), layers, square(tokens), tokens)

    def check_placeholders(self, any_size: bool = False) -> None:
        for part in self.parts:
            part.check_placeholders(any_size)

    def overrides(self, hook: str) -> bool:
        return bool(self.asked_at(hook))

    def asked_at(self, hook: str) -> list[Reducer]:
        own = [self] if super().overrides(hook) else []
        return own + [one for part in self.parts for one in part.asked_at(hook)]
