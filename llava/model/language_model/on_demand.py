"""A decoder layer's attention on demand: nothing is computed unless a reducer asks for rows of it."""

from __future__ import annotations

from torch import Tensor, nn

from llava.model.language_model.cache import VisionCache
from llava.model.language_model.projections import query_key_value, rotated
from llava.model.language_model.stream import Stream
from mustdrop.hooks import Attention, gather


class OnDemand:
    """Queries and keys of one layer on its input; cheap to make, for one is made wherever a reducer is asked.

    `cache` holds the layer's keys, if it has been run with one.
    """

    def __init__(self, layer: nn.Module, entering: Stream, cache: VisionCache | None = None):
        self.layer, self.cache = layer, cache
        self.entering = entering.on(layer.input_layernorm.weight.device)

    def attention(self) -> Attention:
        """The handle that a reducer gets."""
        tokens, window = self.entering.tokens, self.entering.window_of(self.layer)
        first_row = tokens.image.shape[1] - self.entering.hidden.shape[1]
        hides = None if window is None else lambda rows: self.entering.windows.far(rows, window)
        return Attention(self.queries, self.keys, self.layer.self_attn.scaling, tokens.valid, first_row, hides)

    def queries(self, rows: Tensor) -> Tensor:
        """Rotated queries of some rows `[batch, rows]`: `[batch, heads, rows, head_dim]`."""
        attention = self.layer.self_attn
        states = self.layer.input_layernorm(gather(self.entering.hidden, rows))
        return rotated(query_key_value(attention)[0](states), attention, self.entering.rotary_of(rows), "q")

    def keys(self) -> Tensor:
        """Rotated keys `[batch, kv_heads, keys, head_dim]`, the cached ones where they are there already."""
        attention = self.layer.self_attn
        if self.cache is not None:
            return self.cache.layers[attention.layer_idx].keys
        states = self.layer.input_layernorm(self.entering.hidden)
        return rotated(query_key_value(attention)[1](states), attention, self.entering.rotary, "k")
