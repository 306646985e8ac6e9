"""One decoder layer, in full or with less computation for vision tokens, as a plan says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.model.language_model.cache import VisionCache
from llava.model.language_model.packed import run_packed
from mustdrop.hooks import LayerPlan, SplitRows, gather

if TYPE_CHECKING:
    from llava.model.language_model.decoder import Stream


def run_layer(layer: nn.Module, stream: Stream, cache: VisionCache | None, plan: LayerPlan | None = None) -> Tensor:
    """Output of a decoder layer `[batch, length, width]`; with a plan, vision tokens get only what it says.

    All rows go through what vision tokens share with text; text rows alone go through the rest, which is added.
    """
    rows = None if plan is None else stream.split(plan.window, layer.input_layernorm.weight.device)
    context = {"attention_mask": stream.mask, "position_embeddings": stream.rotary, "past_key_values": cache}
    if rows is None:
        packed = stream.packed is not None and not layer._forward_hooks  # somebody wants to see the layer's output
        return run_packed(layer, stream, cache) if packed else layer(stream.hidden, **context)
    attention, hidden = layer.self_attn, stream.hidden.to(rows.text.device)
    active, inactive = _heads(attention, plan)
    states = layer.input_layernorm(hidden)
    if rows.window is None and not inactive:
        hidden = hidden + attention(hidden_states=states, **context)[0]
    else:
        rotary = [table.to(hidden.device).expand(len(hidden), -1, -1) for table in stream.rotary]
        hidden = hidden + _attend(attention, states, rotary, cache, rows, active, inactive)
    return hidden + _thin_mlp(layer.mlp, layer.post_attention_layernorm(hidden), rows, plan)


def run_new_rows(layer: nn.Module, stream: Stream, cache: VisionCache, plan: LayerPlan | None = None) -> Tensor:
    """`run_layer` for newly generated text, in a layer whose prompt was computed with a plan.

    A head that is inactive for vision tokens ignores their columns here too. Where all heads that share a value head
    are inactive, its cached values are zero and nothing is left to do.
    """
    attention = layer.self_attn
    active, inactive = ([], []) if plan is None else _heads(attention, plan)
    if not _share_values(attention, active, inactive):
        return run_layer(layer, stream, cache)
    hidden = stream.hidden.to(layer.input_layernorm.weight.device)
    states, rotary = layer.input_layernorm(hidden), [table.to(hidden.device) for table in stream.rotary]
    query, key = (_rotated(linear(states), attention, rotary) for linear in (attention.q_proj, attention.k_proj))
    key, value = cache.update(key, _by_head(attention.v_proj(states), attention), attention.layer_idx)
    tokens = cache.extended(attention.layer_idx)
    column = torch.arange(key.shape[2], device=key.device)
    sees = (column <= column[-query.shape[2] :, None])[None, None]
    if tokens.valid is not None:
        sees = sees & tokens.valid[:, None, None]
    seen = torch.empty_like(query)
    seen[:, active] = _attention(attention, query[:, active], key, value, active, sees)
    text_value = value.masked_fill(tokens.vision[:, None, :, None], 0)
    seen[:, inactive] = _attention(attention, query[:, inactive], key, text_value, inactive, sees)
    hidden = hidden + attention.o_proj(seen.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _attend(
    attention: nn.Module,
    states: Tensor,
    rotary: list[Tensor],
    cache: VisionCache | None,
    rows: SplitRows,
    active: list[int],
    inactive: list[int],
) -> Tensor:
    """What self-attention adds, for normalised states `[batch, length, width]`.

    An inactive head needs no queries and no outputs of vision rows, and no values if no active head shares them. Keys
    are needed: text rows leave out vision columns after the softmax, whose denominator counts them.
    """
    width, groups = attention.head_dim, attention.num_key_value_groups
    text, text_rotary = gather(states, rows.text), [gather(table, rows.text) for table in rotary]
    valued = sorted({head // groups for head in active})
    unvalued = [head for head in range(attention.v_proj.out_features // width) if head not in valued]
    of_all, of_text, common, rest = (
        _features(heads, width, states.device) for heads in (valued, unvalued, active, inactive)
    )

    value = _outputs(attention.v_proj, states, of_all)
    if unvalued:
        some, value = value, states.new_zeros(*states.shape[:2], attention.v_proj.out_features)
        value[..., of_all] = some
        more = _outputs(attention.v_proj, text, of_text)
        value[..., of_text] = _add_text(states.new_zeros(*states.shape[:2], more.shape[-1]), more, rows)
    key, value = _rotated(attention.k_proj(states), attention, rotary), _by_head(value, attention)
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)

    query = _rotated(_outputs(attention.q_proj, states, common), attention, rotary)
    if rows.window is None:
        seen = _attention(attention, query, key, value, active, rows.causal)
    else:
        seen = _attend_in_window(attention, query, key, value, active, rows)
    output = _inputs(attention.o_proj, seen.transpose(1, 2).flatten(2), common)
    if inactive:
        query = _rotated(_outputs(attention.q_proj, text, rest), attention, text_rotary)
        if _share_values(attention, active, inactive):
            value = value.masked_fill(rows.vision[:, None, :, None], 0)
        seen = _attention(attention, query, key, value, inactive, rows.sees).transpose(1, 2).flatten(2)
        output = _add_text(output, F.linear(seen, attention.o_proj.weight[:, rest]), rows)
    return output


def _attend_in_window(
    attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, heads: list[int], rows: SplitRows
) -> Tensor:
    """Attention `[batch, heads, length, head_dim]` of vision rows to their neighbours, of text rows to all before them.

    Prompt by prompt: picking rows of one is a copy of whole rows, of several a slow gather.
    """
    window = rows.window
    of_text = gather(query.transpose(1, 2), rows.text).transpose(1, 2)
    of_text = _attention(attention, of_text, key, value, heads, rows.sees)
    key, value = (_of_heads(states, heads, attention.num_key_value_groups) for states in (key, value))
    seen = []
    for number in range(len(query)):
        sees = window.sees[number]
        blocks = query[number].index_select(1, window.queries[number]).unflatten(1, sees.shape[:2])
        keys, values = (
            states[number].index_select(1, window.keys[number]).unflatten(1, (len(sees), -1)) for states in (key, value)
        )
        of_vision = F.scaled_dot_product_attention(blocks, keys, values, sees[None], scale=attention.scaling)
        both = torch.cat([of_text[number], of_vision.flatten(1, 2)], dim=1)
        seen.append(both.index_select(1, window.slot[number]))
    return torch.stack(seen)


def _thin_mlp(mlp: nn.Module, states: Tensor, rows: SplitRows, plan: LayerPlan) -> Tensor:
    """The MLP of which vision rows use the first neurons only."""
    total = mlp.gate_proj.out_features
    if (count := plan.neurons(total)) == total:
        return mlp(states)
    first, rest, text = slice(0, count), slice(count, total), gather(states, rows.text)
    inner = mlp.act_fn(_outputs(mlp.gate_proj, states, first)) * _outputs(mlp.up_proj, states, first)
    of_text = mlp.act_fn(_outputs(mlp.gate_proj, text, rest)) * _outputs(mlp.up_proj, text, rest)
    return _add_text(_inputs(mlp.down_proj, inner, first), F.linear(of_text, mlp.down_proj.weight[:, rest]), rows)


def _attention(
    attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, heads: list[int], sees: Tensor | None
) -> Tensor:
    """Attention of some heads, `query` being theirs; `sees` is bool `[batch, 1, rows, tokens]`, None for causal."""
    if not heads:
        return query
    key, value = (_of_heads(states, heads, attention.num_key_value_groups) for states in (key, value))
    causal = sees is None
    return F.scaled_dot_product_attention(query, key, value, sees, is_causal=causal, scale=attention.scaling)


def _heads(attention: nn.Module, plan: LayerPlan) -> tuple[list[int], list[int]]:
    """Heads that are active for vision tokens, and the others."""
    heads = attention.q_proj.out_features // attention.head_dim
    active = plan.active_heads(heads)
    return active, [head for head in range(heads) if head not in active]


def _share_values(attention: nn.Module, active: list[int], inactive: list[int]) -> bool:
    """Whether an inactive head shares its value head with an active one (grouped-query attention)."""
    groups = attention.num_key_value_groups
    return not {head // groups for head in active}.isdisjoint(head // groups for head in inactive)


def _of_heads(states: Tensor, heads: list[int], groups: int) -> Tensor:
    """Keys or values `[batch, kv_heads, tokens, head_dim]`, for each of some heads its own."""
    own = [head // groups for head in heads]
    return states if own == list(range(states.shape[1])) else states[:, own]


def _by_head(states: Tensor, attention: nn.Module) -> Tensor:
    """`[batch, rows, heads * head_dim]` -> `[batch, heads, rows, head_dim]`."""
    return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _rotated(states: Tensor, attention: nn.Module, rotary: list[Tensor]) -> Tensor:
    """Queries or keys `[batch, rows, heads * head_dim]` turned to their positions, `[batch, heads, rows, head_dim]`."""
    states = _by_head(states, attention)
    return apply_rotary_pos_emb(states, states[:, :0], *rotary)[0]


def _add_text(states: Tensor, of_text: Tensor, rows: SplitRows) -> Tensor:
    """States `[batch, length, width]` with something added to the text rows alone, `[batch, text, width]`."""
    return states.scatter_add(1, rows.text[..., None].expand_as(of_text), of_text * rows.real[..., None])


def _features(heads: list[int], width: int, device: torch.device) -> slice | Tensor:
    """Features of some heads in a projection: a slice where they are neighbours, so that no weight is copied."""
    if not heads:
        return slice(0, 0)
    if heads == list(range(heads[0], heads[-1] + 1)):
        return slice(heads[0] * width, (heads[-1] + 1) * width)
    return (torch.tensor(heads, device=device)[:, None] * width + torch.arange(width, device=device)).flatten()


def _outputs(linear: nn.Module, states: Tensor, features: slice | Tensor) -> Tensor:
    """Only some output features of a linear layer."""
    if isinstance(features, slice) and features == slice(0, linear.out_features):
        return linear(states)
    _check_plain(linear)
    return F.linear(states, linear.weight[features], None if linear.bias is None else linear.bias[features])


def _inputs(linear: nn.Module, states: Tensor, features: slice | Tensor) -> Tensor:
    """A linear layer on input features of which only some are given; the others are zero."""
    if isinstance(features, slice) and features == slice(0, linear.in_features):
        return linear(states)
    _check_plain(linear)
    return F.linear(states, linear.weight[:, features], linear.bias)


def _check_plain(linear: nn.Module) -> None:
    if type(linear) is not nn.Linear:
        kind = type(linear).__name__
        raise ValueError(f"plan: a {kind} cannot be computed in part, it must be plain: not quantised, adapters merged")
