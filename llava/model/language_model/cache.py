"""A key-value cache whose layers hold different numbers of positions."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.model.language_model.windows import Windows, place_of
from mustdrop.hooks import ForwardState, Tokens, gather

# What transformers calls a cache, in forward's arguments and in its outputs: the second name until 5.23.
CACHE_NAME = next(
    name
    for name in ("cache", "past_key_values")
    if name in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
)
ROOM = 128  # positions by which a full layer grows, unless fewer are expected


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, the beginning of buffers with room at their end.

    What a prefill computes is kept as it is. The first position generated moves it to buffers, and from then on a new
    position is written where it belongs instead of copying all the others. `keys` and `values` are views of what is
    used; whoever replaces them (beams, a cut) replaces the buffers.
    """

    def __init__(self):
        super().__init__()
        self.room = ROOM
        self.buffers: tuple[Tensor, Tensor] | None = None
        self._view: Tensor | None = None

    @property
    def buffered(self) -> bool:
        """Whether `keys` and `values` are the beginning of the buffers."""
        return self._view is not None and self.keys is self._view

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append new positions `[batch, heads, new, head_dim]`; returns all keys and values."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        if torch.is_grad_enabled() and key_states.requires_grad:
            return super().update(key_states, value_states)
        used, new = self.keys.shape[-2], key_states.shape[-2]
        if not self.buffered or used + new > self.buffers[0].shape[-2]:
            self.reserve(used + max(new, self.room))
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.narrow(-2, used, new).copy_(states)
        return self.show(used + new)

    def reserve(self, capacity: int, buffers: tuple[Tensor, Tensor] | None = None) -> None:
        """Move what is used to buffers of `capacity` positions, or to those given."""
        used = self.keys.shape[-2]
        if buffers is None:
            with torch.inference_mode(False):  # inference tensors could not be written to outside of it later
                buffers = tuple(
                    states.new_empty(*states.shape[:2], capacity, states.shape[3])
                    for states in (self.keys, self.values)
                )
        for buffer, states in zip(buffers, (self.keys, self.values), strict=True):
            buffer.narrow(-2, 0, used).copy_(states)
            buffer.narrow(-2, used, capacity - used).zero_()  # masked, but nan times zero is nan
        self.buffers = buffers
        self.show(used)

    def show(self, used: int) -> tuple[Tensor, Tensor]:
        """Let `keys` and `values` be the first `used` positions of the buffers."""
        self.keys, self.values = (buffer.narrow(-2, 0, used) for buffer in self.buffers)
        self._view = self.keys
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        buffered = self.buffered
        super().crop(tokens_to_remove)
        self._view = self.keys if buffered else None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.buffered:
            super().reorder_cache(beam_idx)
            return
        for states in (self.keys, self.values):
            states.copy_(states.index_select(0, beam_idx.to(states.device)))


class VisionCache(DynamicCache):
    """Transformers' dynamic cache in growing buffers, plus what is known about each layer's entries.

    Attributes
    ----------
    state : ForwardState
        The forward pass that filled the cache.
    records : list of Tokens
        Per layer, the cached prompt positions; layers with equal contents share one record.
    next_position : list of int64 `[..., batch]`
        Per layer, the rotary position after the prompt's last.
    generated : int
        Positions appended since prefill.
    span : int
        Positions that the longest prompt took before anything was dropped, at most.
    expected : int
        Positions that will be appended at most, as far as is known.
    """

    def __init__(self, config, state: ForwardState | None = None):
        super().__init__()
        self.config = config
        self.layers = [GrowingLayer() for _ in range(config.num_hidden_layers)]
        self.state = state
        self.records: list[Tokens] = []
        self.next_position: list[Tensor] = []
        self.generated = self.span = 0
        self.expected = ROOM

    @property
    def filled(self) -> bool:
        """Whether a prefill is in the cache."""
        return bool(self.records)

    @property
    def allocated_bytes(self) -> int:
        """Bytes set aside for keys and values, room for more included; `keys.nbytes` and `values.nbytes` are in use."""
        held = [layer.buffers if layer.buffered else (layer.keys, layer.values) for layer in self.layers]
        return sum(keys.nbytes + values.nbytes for keys, values in held)

    def expect(self, new_tokens: int) -> None:
        """Say how many positions will be generated at most."""
        self.expected = new_tokens
        for layer in self.layers:
            layer.room = max(1, min(new_tokens, ROOM))

    def start_decoding(self, state: ForwardState) -> None:
        """Take over the records of a finished prefill."""
        self.state, self.records, self.generated = state, list(state.tokens_in), 0
        following = {key: record.last_position() + 1 for key, record in {id(one): one for one in self.records}.items()}
        self.next_position = [following[id(record)] for record in self.records]

    def check_filled(self) -> None:
        """Raise RuntimeError unless every layer holds what its record says: a layer that caches nothing is a fault."""
        for number, (layer, record) in enumerate(zip(self.layers, self.records, strict=True)):
            held, wanted = layer.get_seq_length(), record.image.shape[1]
            if held != wanted:
                raise RuntimeError(f"cache: layer {number} holds {held} positions after a prefill of {wanted}")

    def positions(self, layer: int, new: int) -> Tensor:
        """Rotary positions of `new` positions about to be appended, int64 `[..., batch, new]`."""
        if self.state.reducer.decode_positions == "cache_length":
            record = self.records[layer]
            first = record.counts + (self.length(layer) - record.image.shape[1])
        else:
            first = self.next_position[layer] + self.generated
        return first[..., None] + torch.arange(new, device=first.device)

    def length(self, layer: int) -> int:
        """Cached positions of a layer, padding included."""
        return self.layers[layer].keys.shape[-2]

    def valid(self, layer: int, new: int) -> Tensor | None:
        """False for padded keys once `new` positions are appended, bool `[batch, keys]`; None without padding."""
        record = self.records[layer]
        if record.valid is None:
            return None
        return F.pad(record.valid, (0, self.length(layer) + new - record.valid.shape[1]), value=True)

    def windows(
        self, windows: tuple[int | None, ...], layer: int, hidden: Tensor, valid: Tensor | None
    ) -> Windows | None:
        """What layers with a sliding window see once the positions of `hidden` `[batch, new, width]` are appended."""
        record, keys = self.records[layer], self.length(layer) + hidden.shape[1]
        known = place_of(record, self.state.reducer.positions == "renumber")
        place = continued(known, record, keys - known.shape[1])
        return Windows.of(self.config, windows, self.span + self.generated + hidden.shape[1], place, hidden, valid)

    def extended(self, layer: int) -> Tokens:
        """The layer's record with the generated positions, as text, at its end."""
        record = self.records[layer]
        new = self.length(layer) - record.image.shape[1]
        if not new:
            return record
        fill = {"image": -1, "vision_index": -1}
        columns = {name: F.pad(getattr(record, name), (0, new), value=fill.get(name, 0)) for name in _COLUMNS}
        goes_on = {name: continued(getattr(record, name), record, new) for name in ("position", "original_column")}
        counts = {name: getattr(record, name) for name in ("images", "instruction_tokens")}
        return Tokens(**columns, **goes_on, valid=self.valid(layer, 0), **counts)

    def select(self, layer: int, indices: Tensor, record: Tokens) -> None:
        """Reduce a layer's entries to the columns `indices` `[batch, kept]`, described by `record`."""
        entry = self.layers[layer]
        entry.keys = gather(entry.keys.transpose(1, 2), indices).transpose(1, 2)
        entry.values = gather(entry.values.transpose(1, 2), indices).transpose(1, 2)
        self.records[layer] = record

    def bytes_per_position(self, layer: int) -> int:
        """Bytes that one cached position of one sample takes in a layer."""
        entry = self.layers[layer]
        heads, _, width = entry.keys.shape[1:]
        return heads * (width * entry.keys.element_size() + entry.values.shape[-1] * entry.values.element_size())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._rebatch(lambda value, dim: value.index_select(dim, beam_idx.to(value.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rebatch(lambda value, dim: value.index_select(dim, indices.to(value.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rebatch(lambda value, dim: value.repeat_interleave(repeats, dim=dim))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.generated -= abs(tokens_to_remove)

    def _rebatch(self, change) -> None:
        """Apply a change of the batch axis to the records; layers that shared one still do."""
        records = {
            id(record): dataclasses.replace(record.map(lambda value: change(value, -2)), prompts=None)
            for record in self.records
        }
        self.records = [records[id(record)] for record in self.records]
        positions = {id(position): change(position, -1) for position in self.next_position}
        self.next_position = [positions[id(position)] for position in self.next_position]


def continued(places: Tensor, record: Tokens, new: int) -> Tensor:
    """Positions or columns `[..., batch, length]` of a record, and those of `new` tokens after its last real one."""
    last = record.last_row()
    last = places.gather(-1, last.expand(*places.shape[:-1], 1))
    return torch.cat([places, last + 1 + torch.arange(new, device=places.device)], dim=-1)


_COLUMNS = ("image", "vision_index", "protected", "instruction")
