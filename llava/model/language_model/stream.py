"""Hidden states on their way through the decoder, and all that has to stay in step with them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llava.model.language_model.packed import PackedRows
from mustdrop.hooks import SplitRows, Tokens, gather


@dataclass
class Stream:
    """What a decoder layer is run on.

    Attributes
    ----------
    hidden : `[batch, length, width]`
        Its input.
    tokens : Tokens
        What each position is.
    mask
        Attention mask in the form that the attention implementation wants.
    rotary : tuple of two `[batch, length, head_dim]`
        Rotary tables `(cos, sin)`.
    splits : dict
        What `split` has found, kept for the layers to come.
    packed : PackedRows or None
        The real rows, if layers are to run on these alone.
    weights : list of `[batch, heads, length, keys]` or None
        Where eager layers leave their attention probabilities, if somebody asked for them.
    """

    hidden: Tensor
    tokens: Tokens
    mask: Any
    rotary: tuple[Tensor, Tensor]
    splits: dict[tuple, SplitRows | None] = field(default_factory=dict)
    packed: PackedRows | None = None
    weights: list[Tensor] | None = None

    def on(self, device: torch.device) -> Stream:
        """The same where a layer's weights are; itself if it is there already, or if they come when they are needed."""
        if device.type == "meta" or self.hidden.device == device == self.rotary[0].device:
            return self
        mask = self.mask.to(device) if hasattr(self.mask, "to") else self.mask
        rotary = tuple(table.to(device) for table in self.rotary)
        return replace(self, hidden=self.hidden.to(device), tokens=self.tokens.to(device), mask=mask, rotary=rotary)

    def split(self, window: int | None) -> SplitRows | None:
        """Text and vision rows apart; worked out once for all layers that see the same tokens."""
        key = window, self.hidden.device
        if key not in self.splits:
            self.splits[key] = SplitRows.of(self.tokens, window)
        return self.splits[key]

    def last_row(self, before: Stream | None = None) -> Stream:
        """The part that belongs to every prompt's last token; the record still describes all positions.

        `before` is that of the layer before: rotary tables are taken over where the tokens are the same.
        """
        rows = self.tokens.last_row()
        if before is not None and before.tokens is self.tokens:
            rotary = before.rotary
        else:
            rotary = tuple(gather(table.expand(len(rows), -1, -1), rows) for table in self.rotary)
        return replace(self, hidden=gather(self.hidden, rows), rotary=rotary)
