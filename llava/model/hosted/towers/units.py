"""Towers whose tokens are merger units: the patches that one vision token of the language model is made of.

A token's state is that of its patches side by side, `[views, units, unit * width]`: whatever a reducer merges or drops,
a merger gets whole units. As long as nothing has changed, the tower's own blocks run as they are, on its own
layout; from then on all views of one size run together, padded, by dense attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.model.hosted.base import TowerRun
from llava.model.hosted.tokens import untouched
from llava.model.hosted.towers.attention import (
    Rotary,
    UnitAttention,
    Windows,
    attend,
    attend_in_windows,
    folded,
    key_bias,
    unfolded,
)
from mustdrop.hooks import Attention, ForwardState, VisionStep, VisionTokens, gather


class Block(Protocol):
    """The parts of a tower's block; states are `[views, patches, width]`, heads `[views, heads, patches, head_dim]`."""

    scale: float

    def queries(self, states: Tensor, rotary: Rotary | None) -> Tensor:
        """Rotated queries of the block's input."""

    def keys(self, states: Tensor, rotary: Rotary | None) -> Tensor:
        """Rotated keys."""

    def queries_keys_values(self, states: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """All three at once."""

    def attended(self, states: Tensor, seen: Tensor) -> Tensor:
        """The block's input and what attention adds to it, `seen` being the heads' outputs."""

    def with_mlp(self, states: Tensor) -> Tensor:
        """These and what the MLP adds to them."""


@dataclass
class Group:
    """Views with the same grid of units.

    Attributes
    ----------
    tokens : VisionTokens
        What is left of them; `hidden` is empty while their states are in the tower's own layout.
    views : list of int
        Their numbers among the views of the call.
    place : int64 `[views, prefix + units * unit]` or None
        Where each patch stands in the tower's flattened layout; None where the two are the same.
    rotary : tuple of two `[1, units * unit, head_dim]` or None
        Tables of all patches of a view.
    windows : Windows or None
        What patches see in windowed blocks.
    """

    tokens: VisionTokens
    views: list[int]
    place: Tensor | None = None
    rotary: Rotary | None = None
    windows: Windows | None = None

    def to(self, device: torch.device) -> Group:
        """The same on a device: a tower may be spread over several."""
        return self if self.tokens.device == device else _moved(self, device)

    def units(self, states: Tensor, unit: int) -> Tensor:
        """States in the tower's layout as those of units, `[views, prefix + units, unit * width]`."""
        states = states.reshape(-1, states.shape[-1])
        whole = states.view(len(self.views), -1, states.shape[-1]) if self.place is None else states[self.place]
        return folded(whole, self.tokens.prefix, unit)

    def rotary_of(self, unit: int) -> Rotary | None:
        """Tables of the tokens that are left, each `[views or 1, tokens * unit, head_dim]`."""
        if self.rotary is None or untouched(self.tokens):
            return self.rotary
        index = self.tokens.patch_index
        return tuple(table[0].unflatten(0, (-1, unit))[index].flatten(1, 2) for table in self.rotary)


def _moved(record: Any, device: torch.device) -> Any:
    """A dataclass with all tensors in it on a device."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, VisionTokens):
            return _moved(value, device)
        if isinstance(value, Windows):
            return value.to(device)
        if isinstance(value, dict):  # notes
            return {name: moved(own) for name, own in value.items()}
        return tuple(map(moved, value)) if isinstance(value, tuple) else value

    return replace(record, **{f.name: moved(getattr(record, f.name)) for f in fields(record)})


@dataclass
class Stage:
    """What comes into a block: the groups, and whether their states have left the tower's own layout."""

    groups: list[Group]
    apart: bool = False


@dataclass
class UnitTower:
    """A call of a tower, block by block, with the points at which a reducer is asked.

    Attributes
    ----------
    state : ForwardState
        The forward pass.
    blocks : sequence of Block
        All of the tower's.
    unit : int
        Patches of a unit.
    start : list of Group
        What comes into the first block.
    windowed, needed : frozenset of int
        Blocks that see windows alone; blocks after which the stock code reads the states, besides the last one.
    maps : dict of int to list of Tensor
        `patch_to_token` of every group after each block that changed one.
    stages : dict of int to Stage
        What comes into each block that is still to be run.
    """

    state: ForwardState
    blocks: Sequence[Block]
    unit: int
    start: list[Group]
    windowed: frozenset[int] = frozenset()
    needed: frozenset[int] = frozenset()
    maps: dict[int, list[Tensor]] = field(default_factory=dict)
    stages: dict[int, Stage] = field(init=False)

    def __post_init__(self) -> None:
        self.stages = {0: Stage(self.start)}

    def turn(self, rotary: Rotary) -> None:
        """Take the rotary tables of all patches in the tower's own layout, `[patches, head_dim]`, for the first block.

        Views of one grid have the same ones.
        """
        for group in self.start:
            patches = group.tokens.patch_to_token.shape[1] * self.unit
            place = slice(0, patches) if group.place is None else group.place[0]
            group.rotary = tuple(table[place][None] for table in rotary)

    def run(self, index: int, states: Tensor, whole: Callable, attended: Callable) -> Tensor:
        """A block's output in the tower's own layout, where the stock code needs one; else anything of that shape.

        `states` is the input in that layout; `whole` and `attended` are the stock block, and its part before the MLP.
        """
        # A block that is computed once more for its gradient begins where it began.
        stage = self.stages[index] if torch.is_grad_enabled() else self.stages.pop(index)
        stage = Stage([group.to(states.device) for group in stage.groups], stage.apart)
        entering, last = (stage, states), index + 1 == len(self.blocks)
        if self.state.overrides("inside_vision_block"):
            stage, states = self._in_two(index, stage, states, attended)
        elif stage.apart:
            stage = self._each(stage, lambda group: self._with_mlp(index, self._attended(index, group)))
        else:
            states = whole(states)
        if self.state.overrides("after_vision_block"):
            stage = self._choose("after_vision_block", stage, states, index, entering)
        maps = [group.tokens.patch_to_token for group in stage.groups]
        if any(group.tokens.patch_to_token is not own for group, own in zip(entering[0].groups, maps, strict=True)):
            self.maps[index] = maps
        if last:
            stage = self._choose("on_vision_features", stage, states)
        self.stages[index + 1] = stage
        return self._full(stage, states) if stage.apart and (last or index in self.needed) else states

    def _in_two(self, index: int, stage: Stage, states: Tensor, attended: Callable) -> tuple[Stage, Tensor]:
        """A block whose tokens may be merged or dropped between attention and MLP."""
        entering = stage, states
        if stage.apart:
            stage = self._each(stage, lambda group: self._attended(index, group))
        else:
            states = attended(states)
        stage = self._choose("inside_vision_block", stage, states, index, entering)
        if stage.apart:
            return self._each(stage, lambda group: self._with_mlp(index, group.tokens)), states
        return stage, self.blocks[index].with_mlp(states)

    def _each(self, stage: Stage, change: Callable[[Group], VisionTokens]) -> Stage:
        return Stage([replace(group, tokens=change(group)) for group in stage.groups], stage.apart)

    def _choose(
        self, hook: str, stage: Stage, states: Tensor, index: int = -1, entering: tuple[Stage, Tensor] | None = None
    ) -> Stage:
        """What goes on of every group after a hook; after a block, `entering` is what came into it."""
        if not self.state.overrides(hook):
            return stage
        shown = [self._with_states(group, stage.apart, states) for group in stage.groups]
        inputs = shown if entering is None else entering[0].groups
        chosen = []
        for group, own in zip(shown, inputs, strict=True):
            step = VisionStep(group.tokens) if entering is None else self._step(hook, index, group, own, entering)
            chosen.append(replace(group, tokens=self.state.choose(hook, step)))
        kept = [_same(new.tokens, old.tokens) for new, old in zip(chosen, shown, strict=True)]
        if stage.apart or not all(kept):
            return Stage(chosen, True)
        return Stage([replace(group, tokens=_without_states(group.tokens)) for group in chosen])

    def _with_states(self, group: Group, apart: bool, states: Tensor) -> Group:
        return group if apart else replace(group, tokens=group.tokens.with_hidden(group.units(states, self.unit)))

    def _step(self, hook: str, index: int, group: Group, own: Group, entering: tuple[Stage, Tensor]) -> VisionStep:
        """What a reducer sees of a group: `group` behind the block, `own` before it."""
        stage, states = entering
        last = index + 1 == len(self.blocks)
        before = lambda: self._with_states(own, stage.apart, states).tokens.hidden  # noqa: E731
        following = None
        if hook == "after_vision_block" and not last:
            following = self._on_demand(index + 1, group, lambda: group.tokens.hidden)
        return VisionStep(
            group.tokens,
            block=index,
            blocks=len(self.blocks),
            run=len(self.blocks),
            attention=self._on_demand(index, own, before),
            next_attention=following,
        )

    def _on_demand(self, index: int, group: Group, hidden: Callable[[], Tensor]) -> UnitAttention:
        """A block's attention between the units of a group that come into it as `hidden`; nothing is computed yet."""
        block, tokens, unit = self.blocks[index], group.tokens, self.unit

        def states(rows: Tensor | None = None) -> tuple[Tensor, Rotary | None]:
            given, rotary = unfolded(hidden(), tokens.prefix, unit), group.rotary_of(unit)
            if rows is None:
                return given, rotary
            rotary = rotary and tuple(gather(table.expand(len(rows), -1, -1), rows) for table in rotary)
            return gather(given, rows), rotary

        windows = group.windows if index in self.windowed else None
        valid = None if tokens.valid is None else tokens.valid.repeat_interleave(unit, dim=-1)
        patches = Attention(
            queries=lambda rows: block.queries(*states(rows)),
            keys=lambda: block.keys(*states()),
            scale=block.scale,
            valid=None if valid is None else F.pad(valid, (tokens.prefix, 0), value=True),
            hides=None if windows is None else lambda rows: windows.hides(tokens, unit, rows),
        )
        return UnitAttention(patches, tokens.prefix, unit)

    def _attended(self, index: int, group: Group) -> VisionTokens:
        """A group's tokens with what attention adds to them."""
        block, tokens, unit = self.blocks[index], group.tokens, self.unit
        states = unfolded(tokens.hidden, tokens.prefix, unit)
        parts = block.queries_keys_values(states, group.rotary_of(unit))
        proportional = self.state.any("proportional_attention") and not untouched(tokens)
        bias = key_bias(tokens, unit, proportional, states.dtype)
        if index in self.windowed:
            seen = attend_in_windows(parts, bias, block.scale, group.windows, tokens, unit)
        else:
            seen = attend(*parts, bias, block.scale)
        return tokens.with_hidden(folded(block.attended(states, seen), tokens.prefix, unit))

    def _with_mlp(self, index: int, tokens: VisionTokens) -> VisionTokens:
        states = self.blocks[index].with_mlp(unfolded(tokens.hidden, tokens.prefix, self.unit))
        return tokens.with_hidden(folded(states, tokens.prefix, self.unit))

    def _full(self, stage: Stage, states: Tensor) -> Tensor:
        """Groups in the tower's own layout, shaped like `states`; zero where a unit has no token on it."""
        width = states.shape[-1]
        full = states.new_zeros(states.numel() // width + 1, width)  # the last row takes what is padding
        for group in stage.groups:
            tokens, prefix, end = group.tokens, group.tokens.prefix, len(full) - 1
            place = group.place
            if place is None:
                place = torch.arange(end, device=full.device).view(len(group.views), -1)
            units = place[:, prefix:].unflatten(1, (-1, self.unit))
            to = units.gather(1, tokens.patch_index[..., None].expand(-1, -1, self.unit))
            to = to if tokens.valid is None else to.masked_fill(~tokens.valid[..., None], end)
            to = torch.cat([place[:, :prefix], to.flatten(1)], dim=1)
            full = full.index_copy(0, to.flatten(), unfolded(tokens.hidden, prefix, self.unit).flatten(0, 1))
        return full[:-1].view(states.shape)

    def result(self) -> TowerRun:
        """What the call did, view by view."""
        groups = self.stages[len(self.blocks)].groups
        views = [group.views for group in groups]
        return TowerRun(
            together([group.tokens for group in groups], views),
            by_view([group.tokens.patch_to_token for group in self.start], views, -1),
            {block: by_view(own, views, -1) for block, own in self.maps.items()},
        )


def _same(tokens: VisionTokens, before: VisionTokens) -> bool:
    """Whether tokens are where they were, with the states they had; they may have become key tokens."""
    return untouched(tokens) and tokens.hidden is before.hidden


def _without_states(tokens: VisionTokens) -> VisionTokens:
    return tokens.with_hidden(tokens.hidden.new_empty(*tokens.hidden.shape[:2], 0))


def by_view(parts: list[Tensor], views: list[list[int]], fill: int | bool) -> Tensor:
    """Rows of groups `[views, columns]` in the order of the views, filled up on the right."""
    if len(parts) == 1:
        return parts[0]
    most = max(part.shape[1] for part in parts)
    device = parts[0].device
    rows = torch.cat([F.pad(part.to(device), (0, most - part.shape[1]), value=fill) for part in parts])
    order = torch.tensor([view for own in views for view in own]).argsort()
    return rows[order.to(device)]


def together(groups: list[VisionTokens], views: list[list[int]]) -> VisionTokens:
    """The tokens of all groups, one row per view in their order, without states."""
    if len(groups) == 1:
        return _without_states(groups[0].without_prefix())
    order = sorted(range(sum(map(len, views))), key=[view for own in views for view in own].__getitem__)
    lengths = [length for tokens in groups for length in tokens.known_lengths]
    lengths = tuple(lengths[row] for row in order)
    index = by_view([tokens.patch_index for tokens in groups], views, 0)
    valid = torch.arange(index.shape[1]) < torch.tensor(lengths)[:, None]
    protected, keys = None, None
    if any(tokens.protected is not None for tokens in groups):
        none = [torch.zeros_like(tokens.patch_index, dtype=torch.bool) for tokens in groups]
        marks = [own if of.protected is None else of.protected for of, own in zip(groups, none, strict=True)]
        numbers = [key for tokens in groups for key in tokens.keys or (0,) * len(tokens.patch_index)]
        protected, keys = by_view(marks, views, False), tuple(numbers[row] for row in order)
    return VisionTokens(
        hidden=index.new_empty(*index.shape, 0, dtype=groups[0].hidden.dtype),
        patch_index=index,
        patch_to_token=by_view([tokens.patch_to_token for tokens in groups], views, -1),
        grid=groups[0].grid,
        prefix=0,
        valid=valid.to(index.device),
        protected=protected,
        lengths=lengths,
        keys=keys,
        notes=_noted(groups, views),
    )


def _noted(groups: list[VisionTokens], views: list[list[int]]) -> dict[str, Tensor] | None:
    """What was noted of the tokens of all groups; zero where a group has no such note."""
    noted = {name: values for tokens in groups for name, values in (tokens.notes or {}).items()}

    def of(tokens: VisionTokens, name: str) -> Tensor:
        own = (tokens.notes or {}).get(name)
        return noted[name].new_zeros(tokens.patch_index.shape) if own is None else own

    return {name: by_view([of(tokens, name) for tokens in groups], views, 0) for name in noted} or None
