"""A key-value cache whose layers hold different numbers of positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from mustdrop.hooks import Call, Tokens, gather


class VisionCache(DynamicCache):
    """Transformers' dynamic cache plus what is known about each layer's entries.

    Attributes
    ----------
    call : Call
        The forward pass that filled the cache.
    records : list of Tokens
        Per layer, the cached prompt positions; layers with equal contents share one record.
    next_position : list of int64 `[..., batch]`
        Per layer, the rotary position after the prompt's last.
    generated : int
        Positions appended since prefill.
    """

    def __init__(self, config, call: Call | None = None):
        super().__init__(config=config)
        self.call = call
        self.records: list[Tokens] = []
        self.next_position: list[Tensor] = []
        self.generated = 0

    @property
    def filled(self) -> bool:
        """Whether a prefill is in the cache."""
        return bool(self.records)

    def start_decoding(self, call: Call) -> None:
        """Take over the records of a finished prefill."""
        self.call, self.records, self.generated = call, list(call.entered), 0
        following = {id(record): record.last_position() + 1 for record in self.records}
        self.next_position = [following[id(record)] for record in self.records]

    def positions(self, layer: int, new: int) -> Tensor:
        """Rotary positions of `new` positions about to be appended, int64 `[..., batch, new]`."""
        if self.call.reducer.decode_positions == "cache_length":
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

    def extended(self, layer: int) -> Tokens:
        """The layer's record with the generated positions, as text, at its end."""
        record = self.records[layer]
        new = self.length(layer) - record.image.shape[1]
        if not new:
            return record
        fill = {"image": -1, "index": -1}
        columns = {name: F.pad(getattr(record, name), (0, new), value=fill.get(name, 0)) for name in _COLUMNS}
        return Tokens(**columns, valid=self.valid(layer, 0), images=record.images, questions=record.questions)

    def keep(self, layer: int, keep: Tensor) -> None:
        """Drop a layer's entries that are False in `keep` `[batch, keys]`."""
        self.select(layer, *self.extended(layer).select(keep))

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
        records = {id(record): record.map(lambda value: change(value, -2)) for record in self.records}
        self.records = [records[id(record)] for record in self.records]
        positions = {id(position): change(position, -1) for position in self.next_position}
        self.next_position = [positions[id(position)] for position in self.next_position]


_COLUMNS = ("position", "source", "image", "index", "protected", "question")
