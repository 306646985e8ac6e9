"""Hidden states on their way through the decoder, and all that has to stay in step with them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llava.model.language_model.packed import PackedRows
from llava.model.language_model.windows import Windows
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
        Attention mask of layers that see all positions before, in the form that the attention implementation wants.
    rotary : tuple of two `[batch, length, head_dim]`
        Rotary tables `(cos, sin)`.
    splits : dict
        What `split` has found, kept for the layers to come.
    packed : PackedRows or None
        The real rows, if layers are to run on these alone.
    weights : list of `[batch, heads, length, keys]` or None
        Where eager layers leave their attention probabilities, if somebody asked for them.
    windows : Windows or None
        What layers with a sliding window see, where that is less.
    """

    hidden: Tensor
    tokens: Tokens
    mask: Any
    rotary: tuple[Tensor, Tensor]
    splits: dict[tuple, SplitRows | None] = field(default_factory=dict)
    packed: PackedRows | None = None
    weights: list[Tensor] | None = None
    windows: Windows | None = None

    def with_hidden(self, hidden: Tensor) -> Stream:
        """The same tokens with other hidden states `[batch, length, width]`, on the device of these."""
        if hidden.device != self.hidden.device:
            return replace(self, hidden=hidden, tokens=self.tokens.to(hidden.device))
        # By position and not by `replace`, which takes ten times as long: this is done after every layer.
        rest = self.splits, self.packed, self.weights, self.windows
        return Stream(hidden, self.tokens, self.mask, self.rotary, *rest)

    def on(self, device: torch.device) -> Stream:
        """The same where a layer's weights are; itself if it is there already, or if they come when they are needed."""
        if device.type == "meta" or self.hidden.device == device == self.rotary[0].device:
            return self
        mask = self.mask.to(device) if hasattr(self.mask, "to") else self.mask
        rotary = tuple(table.to(device) for table in self.rotary)
        windows = self.windows and self.windows.to(device)
        hidden, tokens = self.hidden.to(device), self.tokens.to(device)
        return replace(self, hidden=hidden, tokens=tokens, mask=mask, rotary=rotary, windows=windows)

    def window_of(self, layer: nn.Module) -> int | None:
        """How many positions back a layer sees, if that hides any of these tokens."""
        window = None if self.windows is None else self.windows.of_layer[layer.self_attn.layer_idx]
        return window if window is not None and window < self.windows.span else None

    def mask_of(self, layer: nn.Module) -> Any:
        """The attention mask of a layer."""
        window = self.window_of(layer)
        return self.mask if window is None else self.windows.masks[window]

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
        windows = self.windows and self.windows.only(rows)
        kept = before is not None and before.tokens is self.tokens
        rotary = before.rotary if kept else self.rotary_of(rows)
        return replace(self, hidden=gather(self.hidden, rows), rotary=rotary, windows=windows)

    def rotary_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables of some rows `[batch, rows]`: `[batch, rows, head_dim]`."""
        cos, sin = (table.to(rows.device) for table in self.rotary)
        if len(cos) != len(rows):
            cos, sin = (table.expand(len(rows), -1, -1) for table in (cos, sin))
        return gather(cos, rows), gather(sin, rows)
