"""MustDrop as the authors' code computes it, written anew, as a baseline of the speed benchmark.

It chooses the same tokens as `mustdrop` with `compat: official` at the same numbers, and costs what theirs costs: every
ViT block computes and keeps all its attention weights, the last one too; so does every decoder layer from the first
filter on, in float32 and with a mask that is added; positions are looked up layer by layer, and new keys and values are
concatenated. One prompt at a time, as there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from eval.bench.model import Inputs
from eval.bench.passes import Clock, Pass, cache_bytes, peak_memory
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.language_model.projections import heads_of
from mustdrop import MustDrop


@torch.inference_mode()
def run_eager(model, reducer: MustDrop, inputs: Inputs, new_tokens: int) -> Pass:
    """A pass over the weights of this project's LLaVA, with the numbers of tokens of `reducer`.

    `reducer` works to numbers, in the authors' order of tokens and positions; there is one prompt.
    """
    clock, decoder, cache = Clock(model.device), model.get_model(), DynamicCache()
    tables = _tables(decoder, inputs)
    with peak_memory(model.device) as peak:
        clock.mark("start")
        features, keys = _tower(model, reducer, inputs.pixels)
        clock.mark("projector")
        features = decoder.mm_projector(features)
        clock.mark("projected")
        clock.mark("spliced")
        hidden = _prefill(decoder, reducer, inputs.ids, features, keys, cache, tables)
        token = model.lm_head(decoder.norm(hidden)[:, -1:]).argmax(-1)
        clock.mark("first")
        cached = cache_bytes(cache)
        clock.mark("decoding")
        for _ in range(new_tokens - 1):
            token = _decode(model, token, cache, tables).argmax(-1)
        clock.mark("end")
    return Pass(clock.parts(), cached, peak.bytes)


def _tables(decoder: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Rotary tables `[positions, head_dim]`, which their code computes once for a model: not part of the pass."""
    positions = inputs.ids.shape[1] + decoder.get_vision_tower().num_patches + 4096
    return tuple(table[0] for table in decoder.rotary_emb(inputs.pixels, torch.arange(positions)[None].to(inputs.ids)))


def _tower(model, reducer: MustDrop, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features `[1, tokens, width]`, and which of them are key tokens, bool `[tokens]`."""
    tower = model.get_vision_tower()
    inner, blocks = tower.vision_tower, tower.vision_tower.encoder.layers
    hidden, states = inner.pre_layrnorm(inner.embeddings(pixels)), []
    for number, block in enumerate(blocks):
        states.append(hidden)
        hidden, weights = _vision_block(block, hidden)
        if number == reducer.merge_block:
            hidden = _merged(hidden, reducer, tower.num_patches_per_side)
    features, score = states[tower.blocks_run][:, 1:], weights[0, :, 0, 1:].mean(0)
    keys = torch.zeros_like(score, dtype=torch.bool)
    keys[score.topk(math.ceil(reducer.key_rate * len(score))).indices] = True
    return features, keys


def _vision_block(block: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Output of a ViT block and all its attention weights `[1, heads, tokens, tokens]`."""
    attention, states = block.self_attn, block.layer_norm1(hidden)
    query, key, value = (
        linear(states).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2).contiguous()
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    weights = ((query * attention.scale) @ key.transpose(2, 3)).softmax(-1)
    hidden = hidden + attention.out_proj((weights @ value).transpose(1, 2).flatten(2))
    return hidden + block.mlp(block.layer_norm2(hidden)), weights


def _merged(hidden: Tensor, reducer: MustDrop, side: int) -> Tensor:
    """`[1, 1 + patches, width]` with the most similar windows averaged: CLS, these by falling score, the others."""
    window, patches = reducer.window, hidden[0, 1:]
    count = (side * side - reducer.parts[0].merged(side * side)) // (window**2 - 1)
    whole = side // window
    index = torch.arange(side * side, device=hidden.device).view(side, side)[: whole * window, : whole * window]
    index = index.view(whole, window, whole, window).transpose(1, 2).reshape(whole * whole, window**2)
    cells = F.normalize(patches[index].float(), dim=-1)
    similar = cells @ cells.transpose(1, 2)
    score = (similar.sum((1, 2)) - similar.diagonal(dim1=1, dim2=2).sum(-1)) / (window**2 * (window**2 - 1))
    best = score.argsort(descending=True, stable=True)[:count]
    stays = torch.ones(len(patches), dtype=torch.bool, device=hidden.device)
    stays[index[best].flatten()] = False
    return torch.cat([hidden[0, :1], patches[index[best]].mean(1), patches[stays]])[None]


def _prefill(
    decoder: nn.Module,
    reducer: MustDrop,
    ids: Tensor,
    features: Tensor,
    keys: Tensor,
    cache: DynamicCache,
    tables: tuple[Tensor, Tensor],
) -> Tensor:
    """Hidden states after all layers `[1, length, width]`; caches between the filters are cut to the survivors.

    `features` `[1, tokens, width]` are the projected ones, `keys` `[tokens]` is True for key tokens.
    """
    first = int((ids[0] == IMAGE_TOKEN_INDEX).nonzero())
    before, after = (decoder.embed_tokens(part) for part in (ids[:, :first], ids[:, first + 1 :]))
    hidden = torch.cat([before, features, after], dim=1)
    filters = next(part for part in reducer.flat() if hasattr(part, "layers_of"))
    patches = decoder.get_vision_tower().num_patches
    schedule = filters.schedule(len(decoder.layers), patches, len(keys), int(keys.sum()))
    column, mask, columns = torch.arange(hidden.shape[1], device=hidden.device), None, []
    for number, layer in enumerate(decoder.layers):
        if number >= min(schedule) and mask is None:
            mask = _causal(hidden)
        columns.append(column)
        position = torch.arange(hidden.shape[1], device=hidden.device)
        hidden, weights = _layer(layer, hidden, cache, tuple(table[position][None] for table in tables), mask)
        if schedule.get(number, len(keys)) < len(keys):
            rows = weights.mean(1)[0, -after.shape[1] :, first : first + len(keys)]
            stays = _best(rows, keys, schedule[number], filters)
            left = torch.cat([column[:first], column[first:][stays], column[first + len(keys) :]])
            hidden = hidden[:, torch.isin(column, left)]
            column, keys, mask = left, keys[stays], None
    for number in range(min(schedule), max(schedule) + 1):
        entry, seen = cache.layers[number], torch.isin(columns[number], column)
        entry.keys, entry.values = entry.keys[:, :, seen], entry.values[:, :, seen]
    return hidden


def _best(rows: Tensor, keys: Tensor, count: int, filters) -> Tensor:
    """Which vision tokens go on, their numbers in order `[count]`, by what text `rows` `[text, tokens]` pay them."""
    total, strongest = rows.sum(0), rows.amax(0)
    score = torch.maximum(total / total.sum() * filters.individual_threshold, strongest * filters.global_threshold)
    return score.masked_fill(keys, float("inf")).topk(count).indices.sort().values


def _causal(hidden: Tensor) -> Tensor:
    """The mask that is added to scores `[1, 1, length, length]`, made on the host."""
    length = hidden.shape[1]
    mask = torch.full((length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)
    return mask[None, None].to(hidden.device)


def _layer(
    layer: nn.Module, hidden: Tensor, cache: DynamicCache, rotary: tuple[Tensor, Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Output of a decoder layer, and with a mask all its attention weights `[1, heads, rows, keys]`."""
    attention, states = layer.self_attn, layer.input_layernorm(hidden)
    query, key, value = heads_of(attention, states, rotary)
    key, value = cache.update(key, value, attention.layer_idx)
    key, value = (states.repeat_interleave(attention.num_key_value_groups, dim=1) for states in (key, value))
    weights = None
    if mask is None:
        causal = query.shape[2] > 1
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=attention.scaling)
    else:
        scores = query @ key.transpose(2, 3) * attention.scaling + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        seen = weights @ value
    hidden = hidden + attention.o_proj(seen.transpose(1, 2).contiguous().flatten(2))
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), weights


def _decode(model, token: Tensor, cache: DynamicCache, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Logits `[1, 1, vocabulary]` of one more token; a layer's position is the length of its own cache."""
    decoder = model.get_model()
    hidden = decoder.embed_tokens(token)
    for number, layer in enumerate(decoder.layers):
        length = cache.layers[number].keys.shape[2]
        rotary = tuple(table[None, length : length + 1] for table in tables)
        hidden = _layer(layer, hidden, cache, rotary, None)[0]
    return model.lm_head(decoder.norm(hidden))
