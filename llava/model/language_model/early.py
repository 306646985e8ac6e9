"""A decoder layer whose output is needed for some tokens alone: those that a reducer keeps, or the prompt's last ones.

Attention comes first, for all tokens: later ones see the keys and values of those that go. Who goes is known before
the second half of the layer where a reducer decides by the layer's own attention, and then that half, three quarters
of a layer's work or more, is computed for the others alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llava.model.language_model.cache import VisionCache
from llava.model.language_model.projections import heads_see
from llava.model.language_model.stream import Stream
from mustdrop.hooks import gather, hooked_model

LEAST_ROWS = 4
"""A CPU computes products of fewer rows by other code, which gives other last bits."""


def drop_early(model, on: bool = True):
    """Let a model leave out, in prefills without gradients, what nobody reads; returns the model.

    That is the output projection and the MLP: of a token that is dropped, in the layer after which it is, if the
    reducer decides by the layer's own attention (`Reducer.by_attention`); and of all tokens but the last ones, in the
    last layer, if no more logits are asked for. Logits and choices are the same, to the bit on the CPUs that were
    tried. A trace's counts of multiply-adds go on taking these layers for whole ones, as the papers do. As if not
    switched on run layers with a `LayerPlan`, on packed rows, compiled or with forward hooks, calls that ask for hidden
    states or attention probabilities, and the last layer of transformers' own classes.

    Parameters
    ----------
    model
        What `load_pretrained_model` returns, a class of transformers that can be reduced included.
    on : bool
        False: compute whole layers again.
    """
    hooked_model(model).get_decoder().drops_early = on
    return model


def run_early(
    layer: nn.Module, stream: Stream, cache: VisionCache | None, leaving: Callable[[], Tensor | None]
) -> Tensor:
    """Output of a decoder layer `[batch, kept, width]` for the rows that `leaving` names, int64 `[batch, kept]`.

    It is called when the layer's keys are in the cache; None stands for all rows.
    """
    attention, hidden = layer.self_attn, stream.hidden
    seen, _ = heads_see(attention, layer.input_layernorm(hidden), stream.mask_of(layer), stream.rotary, cache)
    if (rows := leaving()) is not None:
        rows = rows.to(hidden.device)
        hidden, seen = gather(hidden, rows), gather(seen, rows)
    hidden = hidden + attention.o_proj(seen)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def last_rows(hidden: Tensor, count: int) -> Tensor:
    """The columns of the last `count` of `hidden` `[batch, length, width]`, a few more where exactness wants it."""
    length = hidden.shape[1]
    first = max(0, length - max(count, LEAST_ROWS))
    return torch.arange(first, length, device=hidden.device).expand(len(hidden), -1)
