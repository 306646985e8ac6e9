"""Stage 3, in decoding: shrink the key-value cache to what the output needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mustdrop import ops
from mustdrop.checks import check_layers, require
from mustdrop.hooks import Attention, CacheStep, DecoderStep, Keep, Reducer, Tokens
from mustdrop.keep import are_in


@dataclass
class OutputAwareCache(Reducer):
    """The output-aware cache (MustDrop, section 3.4).

    When prefill ends, earlier layers forget the vision tokens that did not survive to the last one.

    Parameters
    ----------
    first_layer : int or float
        Layers from this one on are cut; a float is a fraction of the depth. The published layer is the first filter
        layer, 2 of 32; 0 cuts all.
    output_threshold : float, optional
        Also forget, in each layer, vision tokens to which the output itself pays less attention (mean over heads) than
        this: when prefill ends the prompt's last token, afterwards every generated one. Not part of the published
        method; makes the stage useful without the others. Key tokens stay.
    """

    first_layer: int | float = 2 / 32
    output_threshold: float | None = None

    def __post_init__(self) -> None:
        threshold = self.output_threshold
        require(threshold is None or threshold >= 0, "output_threshold", threshold, "0 or more, or none")

    def check(self, layers: int, blocks: int) -> None:
        check_layers("cache_from", [self.first_layer], layers)

    @property
    def reads_output_attention(self) -> bool:
        return self.output_threshold is not None

    def overrides(self, hook: str) -> bool:
        return super().overrides(hook) and (hook != "after_decode_layer" or self.output_threshold is not None)

    def after_prefill(self, step: CacheStep) -> Keep | None:
        tokens, first = step.tokens, ops.layer_index(self.first_layer, step.layers)
        dropped = step.layer >= first and tokens.images and tokens is not step.final
        if self.output_threshold is None:
            return Keep.like(step.final) if dropped else None
        seen = self._seen(step.attention, tokens, row=0)
        return Keep.where(seen & are_in(step.final, tokens) if dropped else seen)

    def after_decode_layer(self, step: DecoderStep) -> Keep | None:
        return Keep.where(self._seen(step.attention, step.tokens, row=step.hidden.shape[1] - 1))

    def _seen(self, attention: Attention, tokens: Tokens, row: int) -> Tensor:
        """Cached entries to which one row pays enough attention, bool `[batch, length]`."""
        rows = torch.full_like(tokens.image[:, :1], row)
        return attention.mean_over_heads(rows)[:, 0] >= self.output_threshold
