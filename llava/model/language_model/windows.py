"""Sliding windows: layers that see only so many positions back, which are counted in the full prompt.

A drop moves tokens together in memory and not in the prompt. So a window goes by the place that each token had, and
needs a mask of its own wherever the prompt is longer than the window; a shorter one is left to causality alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llava.model.masks import WITH_4D_MASKS, attention_mask
from mustdrop.hooks import Tokens

KNOWN = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Windows:
    """The windows of a decoder over tokens at given places; there is one only where it hides something.

    Attributes
    ----------
    of_layer : tuple of int or None
        Each decoder layer's window: it sees its own position and those less than so many before it. None: all.
    span : int
        Positions that the full prompt takes, at most.
    place : int64 `[batch, keys]`
        Position of every key in the full prompt.
    rows : int64 `[batch, rows]`
        The same of the tokens that look at them.
    masks : dict of int to mask
        For each window, in the form that the attention implementation wants.
    """

    of_layer: tuple[int | None, ...]
    span: int
    place: Tensor
    rows: Tensor
    masks: dict[int, Any]

    @classmethod
    def of(
        cls, config, windows: tuple[int | None, ...], span: int, place: Tensor, hidden: Tensor, valid: Tensor | None
    ) -> Windows | None:
        """Windows for the last rows `hidden` `[batch, rows, width]` of keys at `place`; None where nothing is hidden.

        `valid` `[batch, keys]` is False for padded keys.
        """
        distinct = {window for window in windows if window is not None and window < span}
        if not distinct:
            return None
        if (name := config._attn_implementation) not in WITH_4D_MASKS:
            raise ValueError(
                f"sliding_window: is {min(distinct)}, a prompt takes {span} positions: {name} counts the window in "
                "tokens, also where some were dropped; load the model with attn_implementation='sdpa'"
            )
        keys = place.shape[1]
        masks = {
            window: attention_mask(config, hidden, valid=valid, keys=keys, causal=True, near=(place, window))
            for window in distinct
        }
        return cls(windows, span, place, place[:, keys - hidden.shape[1] :], masks)

    def far(self, rows: Tensor, window: int) -> Tensor:
        """True for keys beyond the window of these rows `[batch, rows]`: bool `[batch, rows, keys]`."""
        return self.place[:, None] <= self.rows.gather(1, rows)[..., None] - window

    def only(self, rows: Tensor) -> Windows:
        """The same, seen from these rows `[batch, rows]` alone; for attention on demand, which needs no masks."""
        return replace(self, rows=self.rows.gather(1, rows), masks={})

    def to(self, device: torch.device) -> Windows:
        """The same on a device."""
        masks = {window: mask.to(device) for window, mask in self.masks.items()}
        return replace(self, place=self.place.to(device), rows=self.rows.to(device), masks=masks)


def windows_of(config, layers: Iterable[nn.Module]) -> tuple[int | None, ...] | None:
    """Each decoder layer's window as the model has it, None for a layer without one, or for a model without any.

    Raises
    ------
    ValueError
        If the model has layers of a kind that the loop does not know.
    """
    kinds = getattr(config, "layer_types", None) or ()
    if unknown := set(kinds).difference(KNOWN):
        raise ValueError(f"layer_types: has {min(unknown)}, the decoder loop runs {' and '.join(KNOWN)} alone")
    # Where layers differ each knows its own window; else all have the configuration's, if its class has such a field.
    common = config.sliding_window if hasattr(type(config), "sliding_window") else None
    if common is None:
        return None
    windows = tuple(getattr(layer.self_attn, "sliding_window", common) for layer in layers)
    return None if set(windows) == {None} else windows


def span_of(tokens: Tokens) -> int:
    """Positions that the longest prompt takes, tokens of its images that were dropped before the decoder included.

    At most, and known to the host: nothing is read from the device.
    """
    length = tokens.image.shape[1]
    return max([length, *(_full_length(prompt) for prompt in tokens.prompts or ())])


def _full_length(prompt) -> int:
    return prompt.text + sum(max(image.patches, image.tokens_in) for image in prompt.images)


def place_of(tokens: Tokens, renumbered: bool) -> Tensor:
    """Where each token stood in the full prompt, int64 `[batch, length]`.

    Rotary positions say so, with the gaps that were left in the vision tower, unless they were numbered anew or have
    several axes.
    """
    return tokens.original_column if renumbered or tokens.position.dim() > 2 else tokens.position
