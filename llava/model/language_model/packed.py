"""A decoder layer on the real rows of a padded batch alone, as a CPU likes it best.

Where every prompt keeps a number of tokens of its own, the longest decides how far a batch is padded, and the mask that
hides the padding makes attention compute the pairs that causality rules out, too. Here linear layers see the real rows
of all prompts in one piece, and attention runs prompt by prompt. The numbers of rows have to be known to the host: they
are after a drop that could not say its count beforehand. On a GPU, a loop over prompts would be slower than padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.model import cpu_attention
from llava.model.language_model.projections import heads_of

KERNELS = {"sdpa": F.scaled_dot_product_attention, cpu_attention.NAME: cpu_attention.attention}


@dataclass
class PackedRows:
    """The real rows of a batch `[batch, length]`.

    `index` int64 `[rows]` counts through the flattened batch, `lengths` are the prompts' numbers of rows, `rotary` the
    tables of these rows, each `[1, rows, head_dim]`.
    """

    index: Tensor
    lengths: list[int]
    shape: tuple[int, int]
    rotary: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, valid: Tensor | None, rotary: tuple[Tensor, Tensor], implementation: str) -> PackedRows | None:
        """The real rows, `valid` bool `[batch, length]`; None where nothing is padded or the plain layer is better."""
        if valid is None or valid.device.type != "cpu" or implementation not in KERNELS or torch.is_grad_enabled():
            return None
        rows = cls(valid.flatten().nonzero()[:, 0], valid.sum(-1).tolist(), tuple(valid.shape))
        rows.rotary = tuple(rows.pack(table.expand(*rows.shape, -1)) for table in rotary)
        return rows

    def pack(self, states: Tensor) -> Tensor:
        """`[batch, length, ...]` -> `[1, rows, ...]`."""
        return states.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, states: Tensor) -> Tensor:
        """`[1, rows, ...]` -> `[batch, length, ...]`, zero where there is padding."""
        padded = states.new_zeros(self.shape[0] * self.shape[1], *states.shape[2:])
        return padded.index_copy_(0, self.index, states[0]).unflatten(0, self.shape)


def packed_layer(
    layer: nn.Module, hidden: Tensor, lengths: Sequence[int], rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[1, rows, width]`, keys and values `[1, kv_heads, rows, head_dim]` of a decoder layer on packed prompts.

    `hidden` `[1, rows, width]` holds prompt after prompt, of `lengths` rows each; `rotary` are the tables of all rows.
    """
    attention = layer.self_attn
    query, key, value = heads_of(attention, layer.input_layernorm(hidden), rotary)
    prompts = zip(*(part.split(list(lengths), dim=2) for part in (query, key, value)), strict=True)
    grouped = attention.num_key_value_groups > 1
    kernel = KERNELS[attention.config._attn_implementation]
    seen = [kernel(*prompt, is_causal=True, scale=attention.scaling, enable_gqa=grouped) for prompt in prompts]
    hidden = hidden + attention.o_proj(torch.cat(seen, dim=2).transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), key, value
