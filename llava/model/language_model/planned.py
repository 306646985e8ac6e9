"""A decoder layer that computes for vision tokens only what a plan says; what it leaves out is not computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.model.language_model.cache import VisionCache
from llava.model.language_model.projections import (
    Part,
    activation,
    by_head,
    gate_and_up,
    heads_of,
    query_key_value,
    rotated,
    self_attention,
)
from llava.model.language_model.stream import Stream
from mustdrop.hooks import LayerPlan, SplitRows, causal_blocks, gather


def run_planned(
    layer: nn.Module, stream: Stream, cache: VisionCache | None, plan: LayerPlan, rows: SplitRows
) -> Tensor:
    """Output of a layer `[batch, length, width]` in prefill.

    All rows go through what vision tokens share with text; text rows alone go through the rest, which is added.
    """
    if stream.weights is not None:
        raise ValueError("output_attentions: a layer with a plan (yopo) has no single matrix of probabilities")
    attention, hidden = layer.self_attn, stream.hidden
    active, inactive = _heads(attention, plan)
    states = layer.input_layernorm(hidden)
    if rows.window is None and not inactive:
        hidden = hidden + self_attention(attention, states, stream.mask_of(layer), stream.rotary, cache)[0]
    elif (window := stream.window_of(layer)) is not None:
        raise ValueError(
            f"sliding_window: is {window}, a prompt of {stream.windows.span} positions is longer: a layer that vision "
            "tokens attend in part only (yopo) has no such window; shorten the prompt, or leave heads and window out"
        )
    else:
        rotary = tuple(table.expand(len(hidden), -1, -1) for table in stream.rotary)
        attend = _attend_all_rows if plan.head_scope == "keys" else _attend
        hidden = hidden + attend(attention, states, rotary, cache, rows, active, inactive)
    return hidden + _thin_mlp(layer.mlp, layer.post_attention_layernorm(hidden), rows, plan)


def run_new_rows(layer: nn.Module, stream: Stream, cache: VisionCache, plan: LayerPlan) -> Tensor | None:
    """Output of a layer for newly generated text, whose prompt was computed with a plan; None if it is the plain one.

    A head that is inactive for vision tokens ignores their columns here too. Where all heads that share a value head
    are inactive, its cached values are zero and nothing is left to do.
    """
    attention = layer.self_attn
    active, inactive = _heads(attention, plan)
    if not _share_values(attention, active, inactive):
        return None
    hidden = stream.hidden
    query, key, value = heads_of(attention, layer.input_layernorm(hidden), stream.rotary)
    key, value = cache.update(key, value, attention.layer_idx)
    tokens = cache.extended(attention.layer_idx)
    column = torch.arange(key.shape[2], device=key.device)
    sees = (column <= column[-query.shape[2] :, None])[None, None]
    if tokens.valid is not None:
        sees = sees & tokens.valid[:, None, None]
    if (window := stream.window_of(layer)) is not None:
        rows = torch.arange(query.shape[2], device=key.device).expand(len(key), -1)
        sees = sees & ~stream.windows.far(rows, window)[:, None]
    seen = torch.empty_like(query)
    seen[:, active] = _attention(attention, query[:, active], key, value, active, sees)
    text_value = value.masked_fill(tokens.vision[:, None, :, None], 0)
    seen[:, inactive] = _attention(attention, query[:, inactive], key, text_value, inactive, sees)
    hidden = hidden + attention.o_proj(seen.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _attend(
    attention: nn.Module,
    states: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: VisionCache | None,
    rows: SplitRows,
    active: list[int],
    inactive: list[int],
) -> Tensor:
    """What self-attention adds, for normalised states `[batch, length, width]`.

    An inactive head needs no queries and no outputs of vision rows. Its keys are needed: text rows leave out vision
    columns after the softmax, whose denominator counts them.
    """
    q_proj = query_key_value(attention)[0]
    common, rest = (_features(heads, attention.head_dim, states.device) for heads in (active, inactive))
    key, value = _keys_and_values(attention, states, rotary, cache, rows, active)
    query = rotated(_outputs(q_proj, states, common), attention, rotary, "q")
    seen = _attend_actively(attention, query, key, value, active, rows)
    output = _inputs(attention.o_proj, seen.transpose(1, 2).flatten(2), common)
    if inactive:
        text, text_rotary = gather(states, rows.text), tuple(gather(table, rows.text) for table in rotary)
        query = rotated(_outputs(q_proj, text, rest), attention, text_rotary, "q")
        if _share_values(attention, active, inactive):
            value = value.masked_fill(rows.vision[:, None, :, None], 0)
        seen = _attention(attention, query, key, value, inactive, rows.sees).transpose(1, 2).flatten(2)
        output = _add_text(output, F.linear(seen, attention.o_proj.weight[:, rest]), rows)
    return output


def _attend_all_rows(
    attention: nn.Module,
    states: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: VisionCache | None,
    rows: SplitRows,
    active: list[int],
    inactive: list[int],
) -> Tensor:
    """What self-attention adds where inactive heads ignore vision keys alone; arguments as in `_attend`."""
    key, value = _keys_and_values(attention, states, rotary, cache, rows, active)
    query = rotated(query_key_value(attention)[0](states), attention, rotary, "q")
    seen = torch.empty_like(query)
    seen[:, active] = _attend_actively(attention, query[:, active], key, value, active, rows)
    if rows.window is None:
        seen[:, inactive] = _attend_to_text(attention, query[:, inactive], key, value, inactive, rows)
    else:
        value = value.masked_fill(rows.vision[:, None, :, None], 0)
        seen[:, inactive] = _attend_in_window(attention, query[:, inactive], key, value, inactive, rows)
    return attention.o_proj(seen.transpose(1, 2).flatten(2))


def _keys_and_values(
    attention: nn.Module,
    states: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: VisionCache | None,
    rows: SplitRows,
    active: list[int],
) -> tuple[Tensor, Tensor]:
    """Keys and values `[batch, kv_heads, length, head_dim]`; vision rows have no values that no active head needs."""
    width, groups = attention.head_dim, attention.num_key_value_groups
    _, k_proj, v_proj = query_key_value(attention)
    valued = sorted({head // groups for head in active})
    unvalued = [head for head in range(v_proj.out_features // width) if head not in valued]
    of_all, of_text = (_features(heads, width, states.device) for heads in (valued, unvalued))
    value = _outputs(v_proj, states, of_all)
    if unvalued:
        some, value = value, states.new_zeros(*states.shape[:2], v_proj.out_features)
        value[..., of_all] = some
        more = _outputs(v_proj, gather(states, rows.text), of_text)
        value[..., of_text] = _add_text(states.new_zeros(*states.shape[:2], more.shape[-1]), more, rows)
    key, value = rotated(k_proj(states), attention, rotary, "k"), by_head(value, attention)
    return (key, value) if cache is None else cache.update(key, value, attention.layer_idx)


def _attend_actively(
    attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, heads: list[int], rows: SplitRows
) -> Tensor:
    """What some heads see of all tokens before, or of a window of them: `[batch, heads, length, head_dim]`."""
    if rows.window is None:
        return _attention(attention, query, key, value, heads, rows.causal)
    return _attend_in_window(attention, query, key, value, heads, rows)


def _attend_to_text(
    attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, heads: list[int], rows: SplitRows
) -> Tensor:
    """What some heads see of the text, `[batch, heads, length, head_dim]`, their softmax counting all tokens before.

    In blocks of rows against the keys up to them, so that the probabilities of all rows are never held together.
    """
    groups = attention.num_key_value_groups
    value = gather(value.transpose(1, 2), rows.text).transpose(1, 2)
    query, key, value = query * attention.scaling, _of_heads(key, heads, groups), _of_heads(value, heads, groups)
    column = torch.arange(query.shape[2], device=query.device)
    seen = []
    for start, stop in causal_blocks(query.shape[2]):
        causal = rows.causal
        sees = column[:stop] <= column[start:stop, None] if causal is None else causal[:, :, start:stop, :stop]
        scores = (query[:, :, start:stop] @ key[:, :, :stop].transpose(2, 3)).masked_fill_(~sees, -torch.inf)
        shares = scores.softmax(-1, dtype=torch.float32)
        # Text after the block has no column in it: it is read elsewhere and counts nothing.
        columns = rows.text.clamp(max=stop - 1)[:, None, None].expand(-1, *shares.shape[1:3], -1)
        of_text = shares.gather(-1, columns) * (rows.real & (rows.text < stop))[:, None, None]
        seen.append(of_text.to(value.dtype) @ value)
    return torch.cat(seen, dim=2)


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
    gate_proj, up_proj = gate_and_up(mlp)
    total, function = gate_proj.out_features, activation(mlp)
    if (count := plan.neurons(total)) == total:
        return mlp(states)
    first, rest, text = slice(0, count), slice(count, total), gather(states, rows.text)
    inner = function(_outputs(gate_proj, states, first)) * _outputs(up_proj, states, first)
    of_text = function(_outputs(gate_proj, text, rest)) * _outputs(up_proj, text, rest)
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
    heads = query_key_value(attention)[0].out_features // attention.head_dim
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


def _check_plain(linear: nn.Module | Part) -> None:
    linear = linear.linear if isinstance(linear, Part) else linear
    if linear.weight.device.type == "meta":
        raise ValueError("plan: the weights are offloaded (device_map), a layer computed in part needs them in place")
    if type(linear) is not nn.Linear:
        kind = type(linear).__name__
        raise ValueError(f"plan: a {kind} cannot be computed in part, it must be plain: not quantised, adapters merged")
