"""The parts of a layer, found by name: the numbers of every text model that the loop knows."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

from llava.model.language_model.cache import VisionCache
from llava.model.language_model.projections import Part, gate_and_up, heads_of, query_key_value, whole_layer
from llava.model.masks import attention_mask

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=4),
    "llama-gqa-wide-heads": LlamaConfig(**SHAPE, num_key_value_heads=2, head_dim=32, attention_bias=True),
    "mistral": MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16),
    "phi3": Phi3Config(**SHAPE, num_key_value_heads=2),
    "phi3-partial-rotary": Phi3Config(
        **SHAPE,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
}


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[request.param], attn_implementation="sdpa").eval().model


@torch.no_grad()
def test_layers_run_by_their_parts_equal_the_model(model):
    embeds = torch.randn(2, 9, 64)
    expected = model(inputs_embeds=embeds).last_hidden_state
    rotary = model.rotary_emb(embeds, torch.arange(9)[None])
    mask = attention_mask(model.config, embeds, valid=None, keys=9, causal=True)
    hidden, cache = embeds, VisionCache(model.config)
    for layer in model.layers:
        hidden, _ = whole_layer(layer, hidden, mask, rotary, cache)
    assert torch.equal(model.norm(hidden), expected)
    assert [entry.keys.shape[2] for entry in cache.layers] == [9, 9]


@torch.no_grad()
def test_a_part_of_fused_weights_is_a_layer_of_its_own(model):
    layer, states = model.layers[0], torch.randn(2, 9, 64)
    rotary = model.rotary_emb(states, torch.arange(9)[None])
    query, key, value = query_key_value(layer.self_attn)
    assert [part.out_features for part in (query, key, value)] == [part.weight.shape[0] for part in (query, key, value)]
    by_parts = value(states).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)
    torch.testing.assert_close(heads_of(layer.self_attn, states, rotary)[2], by_parts)
    gate, up = gate_and_up(layer.mlp)
    if isinstance(gate, Part):
        torch.testing.assert_close(torch.cat([gate(states), up(states)], -1), layer.mlp.gate_up_proj(states))
