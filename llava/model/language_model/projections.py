"""The parts of a decoder layer, found by attribute names: all that the loop knows about one text model or another.

It holds for LLaMA, Mistral and Qwen2, for Qwen3's norms per head, and for Phi-3's fused weights. Nothing here calls a
layer or an attention module of transformers as a whole: their signatures change, their parts do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward


@dataclass(frozen=True)
class Part:
    """Output features `start` to `stop` of a fused linear layer, as if they were a layer of their own."""

    linear: nn.Module
    start: int
    stop: int

    @property
    def weight(self) -> Tensor:
        return self.linear.weight[self.start : self.stop]

    @property
    def bias(self) -> Tensor | None:
        return None if self.linear.bias is None else self.linear.bias[self.start : self.stop]

    @property
    def out_features(self) -> int:
        return self.stop - self.start

    def __call__(self, states: Tensor) -> Tensor:
        if type(self.linear) is nn.Linear and self.linear.weight.device.type != "meta":
            return F.linear(states, self.weight, self.bias)
        return self.linear(states)[..., self.start : self.stop]  # quantised, adapted, offloaded


def query_key_value(attention: nn.Module) -> tuple[nn.Module | Part, nn.Module | Part, nn.Module | Part]:
    """The three projections of an attention module: `q_proj`, `k_proj`, `v_proj`, or a `qkv_proj` in that order."""
    if hasattr(attention, "q_proj"):
        return attention.q_proj, attention.k_proj, attention.v_proj
    fused, groups = attention.qkv_proj, attention.num_key_value_groups
    values = fused.out_features // (groups + 2)  # features of all key heads, and of all value heads
    queries = fused.out_features - 2 * values
    bounds = 0, queries, queries + values, fused.out_features
    return tuple(Part(fused, start, stop) for start, stop in zip(bounds, bounds[1:], strict=False))


def heads_of(attention: nn.Module, states: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, of normalised states `[batch, rows, width]`; fused weights in one go.

    Returns `[batch, heads, rows, head_dim]`, and twice `[batch, kv_heads, rows, head_dim]`.
    """
    parts = query_key_value(attention)
    if isinstance(parts[0], Part):
        query, key, value = parts[0].linear(states).split([part.out_features for part in parts], dim=-1)
    else:
        query, key, value = (linear(states) for linear in parts)
    query, key = rotated(query, attention, rotary, "q"), rotated(key, attention, rotary, "k")
    return query, key, by_head(value, attention)


def by_head(states: Tensor, attention: nn.Module) -> Tensor:
    """`[batch, rows, heads * head_dim]` -> `[batch, heads, rows, head_dim]`."""
    return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def rotated(states: Tensor, attention: nn.Module, rotary: tuple[Tensor, Tensor], which: str) -> Tensor:
    """Queries ("q") or keys ("k") by head, normalised where the model does so, and turned to their positions.

    `states` `[batch, rows, heads * head_dim]`; `rotary` is `(cos, sin)`, each `[batch, rows, turned]` with `turned` at
    most the head's width: what is beyond stays as it is. Returns `[batch, heads, rows, head_dim]`.
    """
    norm = getattr(attention, f"{which}_norm", None)
    states = states.unflatten(-1, (-1, attention.head_dim))
    states = (states if norm is None else norm(states)).transpose(1, 2)
    cos, sin = (table.unsqueeze(1) for table in rotary)
    if (width := cos.shape[-1]) == states.shape[-1]:
        return turned(states, cos, sin)
    return torch.cat([turned(states[..., :width], cos, sin), states[..., width:]], dim=-1)


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: the halves of a head are the coordinates of planes, each turned by its own angle."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def attend(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask) -> tuple[Tensor, Tensor | None]:
    """What all heads see `[batch, rows, heads * head_dim]`, by the model's own attention function.

    Also the probabilities `[batch, heads, rows, keys]` if that function makes them (eager), else None. `query`
    `[batch, heads, rows, head_dim]`, `key` and `value` `[batch, kv_heads, keys, head_dim]`.
    """
    name = attention.config._attn_implementation
    function = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    dropout = attention.attention_dropout if attention.training else 0.0
    seen, weights = function(attention, query, key, value, mask, dropout=dropout, scaling=attention.scaling)
    return seen.flatten(2), weights


def gate_and_up(mlp: nn.Module) -> tuple[nn.Module | Part, nn.Module | Part]:
    """The two inner projections of a gated MLP: `gate_proj` and `up_proj`, or a `gate_up_proj` in that order."""
    if hasattr(mlp, "gate_proj"):
        return mlp.gate_proj, mlp.up_proj
    fused, half = mlp.gate_up_proj, mlp.gate_up_proj.out_features // 2
    return Part(fused, 0, half), Part(fused, half, 2 * half)


def activation(mlp: nn.Module) -> nn.Module:
    """The function between a gated MLP's projections."""
    return mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn


def whole_layer(
    layer: nn.Module, hidden: Tensor, mask, rotary: tuple[Tensor, Tensor], cache=None
) -> tuple[Tensor, Tensor | None]:
    """A decoder layer in full: its output `[batch, rows, width]`, and the attention probabilities that `attend` gives.

    `cache` has `update(keys, values, layer)` as transformers' caches do: it takes new keys and values `[batch,
    kv_heads, rows, head_dim]` and returns all there are.
    """
    seen, weights = self_attention(layer.self_attn, layer.input_layernorm(hidden), mask, rotary, cache)
    hidden = hidden + seen
    del seen  # what is let go now is memory that the MLP need not ask the system for
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), weights


def self_attention(
    attention: nn.Module, states: Tensor, mask, rotary: tuple[Tensor, Tensor], cache=None
) -> tuple[Tensor, Tensor | None]:
    """What self-attention adds to states that are given normalised, `[batch, rows, width]`, and `attend`'s weights.

    `cache` is as in `whole_layer`.
    """
    seen, weights = heads_see(attention, states, mask, rotary, cache)
    return attention.o_proj(seen), weights


def heads_see(
    attention: nn.Module, states: Tensor, mask, rotary: tuple[Tensor, Tensor], cache=None
) -> tuple[Tensor, Tensor | None]:
    """`attend` for normalised states `[batch, rows, width]`, all of them; `cache` as in `whole_layer`."""
    query, key, value = heads_of(attention, states, rotary)
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    return attend(attention, query, key, value, mask)
