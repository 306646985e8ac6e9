"""One decoder layer: as the model has it, with less computation for vision tokens, on packed rows, or compiled."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer as StockLayer

from llava.model.language_model.cache import VisionCache
from llava.model.language_model.compiled import Compiled
from llava.model.language_model.early import Rows, run_early
from llava.model.language_model.packed import packed_layer
from llava.model.language_model.planned import run_new_rows, run_planned
from llava.model.language_model.projections import whole_layer
from llava.model.language_model.stream import Stream
from mustdrop.hooks import LayerPlan


class StreamLayer:
    """Mixin of a decoder layer of transformers: the same parts, run as the loop wants it.

    Being a module's forward, it runs under whatever has been put around the layer: forward hooks, gradient
    checkpointing, wrappers that gather weights or move states.
    """

    def forward(
        self,
        hidden: Tensor,
        stream: Stream,
        cache: VisionCache | None = None,
        plan: LayerPlan | None = None,
        compiled: Compiled | None = None,
        only: Rows | None = None,
    ) -> Tensor:
        """`run_layer` on hidden states `[batch, length, width]` that take the place of the stream's."""
        stream = stream if hidden is stream.hidden else replace(stream, hidden=hidden)
        return run_layer(self, stream, cache, plan, compiled, only)


class LlamaDecoderLayer(StreamLayer, StockLayer):
    """LLaMA's layer; it bears LLaMA's name because tools that place or wrap layers go by it."""


def run_layer(
    layer: nn.Module,
    stream: Stream,
    cache: VisionCache | None,
    plan: LayerPlan | None = None,
    compiled: Compiled | None = None,
    only: Rows | None = None,
) -> Tensor:
    """Output of a decoder layer `[batch, length, width]`; this is where it is chosen how a layer is run.

    With `only` it is that of some rows alone, see `run_early`.
    """
    stream = stream.on(layer.input_layernorm.weight.device)
    if only is not None:
        return run_early(layer, stream, cache, only)
    if cache is not None and cache.filled:
        if plan is not None and (output := run_new_rows(layer, stream, cache, plan)) is not None:
            return output
    elif plan is not None and (rows := stream.split(plan.window)) is not None:
        return run_planned(layer, stream, cache, plan, rows)
    elif stream.packed is not None and stream.window_of(layer) is None:
        return _run_packed(layer, stream, cache)
    elif compiled is not None:
        return compiled.layer(layer, stream, cache)
    hidden, weights = whole_layer(layer, stream.hidden, stream.mask_of(layer), stream.rotary, cache)
    if stream.weights is not None:
        stream.weights.append(weights)
    return hidden


def _run_packed(layer: nn.Module, stream: Stream, cache: VisionCache | None) -> Tensor:
    """Output of a layer `[batch, length, width]`, zero in padded rows; so are the keys and values it caches."""
    rows = stream.packed
    output, *states = packed_layer(layer, rows.pack(stream.hidden), rows.lengths, rows.rotary)
    if cache is not None:
        keys, values = (rows.unpack(part.transpose(1, 2)).transpose(1, 2) for part in states)
        cache.update(keys, values, layer.self_attn.layer_idx)
    return rows.unpack(output)
