"""A decoder layer whose output is needed for some tokens alone: those that a reducer keeps, or the prompt's last ones.

Attention comes first, for all tokens: later ones see the keys and values of those that go. Who goes is known before
the second half of the layer where a reducer decides by the layer's own attention, and then that half, three quarters
of a layer's work or more, is computed for the others alone.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from llava.model.language_model.cache import VisionCache
from llava.model.language_model.projections import heads_see
from llava.model.language_model.stream import Stream
from mustdrop.hooks import LEAST_ROWS, gather, hooked_model

Rows = int | Callable[[], Tensor | None]
"""So many last rows, or int64 `[batch, kept]` once the layer's keys are in the cache, where None stands for all."""


def drop_early(model, on: bool = True):
    """Let a model leave out of prefills without gradients what nobody reads, as it does by default; returns the model.

    That is the output projection and the MLP: of a token that is dropped, in the layer after which it is, if the
    reducer decides by the layer's own attention (`Reducer.by_attention`); and of all tokens but the last ones, in the
    last layer, if no more logits are asked for. Logits and choices are the same, to the bit on the CPUs that were
    tried. `Trace.mlp_lengths` says what was computed. Whole are layers with a `LayerPlan`, on packed rows, compiled, or
    with forward hooks on them or their parts, calls that ask for hidden states or attention probabilities, and models
    that add something between layers.

    Parameters
    ----------
    model
        What `load_pretrained_model` returns, a class of transformers that can be reduced included.
    on : bool
        False: compute whole layers.
    """
    hooked_model(model).get_decoder().drops_early = on
    return model


def run_early(layer: nn.Module, stream: Stream, cache: VisionCache | None, only: Rows) -> Tensor:
    """Output of a decoder layer `[batch, kept, width]` for some of the rows."""
    attention, hidden = layer.self_attn, stream.hidden
    seen, _ = heads_see(attention, layer.input_layernorm(hidden), stream.mask_of(layer), stream.rotary, cache)
    if isinstance(only, int):
        hidden, seen = hidden[:, -only:], seen[:, -only:]
    elif (rows := only()) is not None:
        rows = rows.to(hidden.device)
        hidden, seen = gather(hidden, rows), gather(seen, rows)
    hidden = hidden + attention.o_proj(seen)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def last_rows(count: int) -> int:
    """As many last rows as are computed where `count` are read: a few more where exactness wants it."""
    return max(count, LEAST_ROWS)


def looked_at(layer: nn.Module) -> bool:
    """Whether somebody put a hook around a layer or a part of its second half, and expects all rows there."""
    parts = layer, layer.mlp, *layer.mlp._modules.values(), layer.self_attn.o_proj, layer.post_attention_layernorm
    return any(part._forward_hooks for part in parts)
