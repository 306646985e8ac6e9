"""What `forward` and `generate` are given: taken under transformers' names, old and new, or refused in one line."""

import inspect
import logging

import pytest
import torch
from tiny import LAYERS, SIDE, ours, pictures, prompt
from transformers import DynamicCache, GenerationConfig

from llava.model.language_model.cache import GrowingLayer, VisionCache
from llava.model.language_model.decoder import LlavaLlamaModel
from llava.model.language_model.llava_llama import position_limit
from mustdrop import load_reducer

PATCHES = SIDE * SIDE
RETAIN = load_reducer({"method": "mustdrop", "retain": 40})


def generate(model=None, images=1, **kwargs):
    settings = {"max_new_tokens": 4, "do_sample": False} | kwargs
    return (model or ours()).generate(prompt(5, 7, images), images=pictures(images) if images else None, **settings)


@pytest.fixture
def warnings(monkeypatch):
    said = []
    logger = logging.getLogger("llava.model.language_model.llava_llama")
    monkeypatch.setattr(logger, "warning", said.append)
    return said


def test_no_argument_is_swallowed():
    for function in (LlavaLlamaModel.forward, type(ours()).forward, LlavaLlamaModel.prefill, LlavaLlamaModel.decode):
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, function
    with pytest.raises(TypeError, match="pasts"):
        ours()(prompt(5, 7, 0), pasts=None)
    with pytest.raises(ValueError, match="pasts"):
        generate(pasts=1)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_a_cache_is_taken_under_both_names(name):
    model, ids, pixels = ours(), prompt(5, 7), pictures(1)
    with RETAIN.on(model):
        cache = VisionCache(model.config)
        first = model(ids, images=pixels, use_cache=True, **{name: cache}).logits[:, -1:].argmax(-1)
        step = model(first, **{name: cache}).logits[:, -1:].argmax(-1)
        own = VisionCache(model.config)
        assert generate(**{name: own})[0, :2].tolist() == [first.item(), step.item()]
    assert cache.filled and own.filled and own.generated == 3


def test_the_cache_of_somebody_else_or_of_another_prompt_is_refused():
    model = ours()
    for name in ("cache", "past_key_values"):
        with pytest.raises(ValueError, match=r"^past_key_values: got a DynamicCache, expected none or a VisionCache"):
            generate(**{name: DynamicCache(config=model.config)})
        with pytest.raises(ValueError, match=r"^past_key_values: got a DynamicCache"):
            model(prompt(5, 7, 0), **{name: DynamicCache()})
    cache = VisionCache(model.config)
    generate(past_key_values=cache)
    with pytest.raises(ValueError, match=r"^past_key_values: the cache holds a prompt already"):
        generate(past_key_values=cache)
    with pytest.raises(ValueError, match=r"^past_key_values: also given as cache"):
        model(prompt(5, 7, 0), past_key_values=VisionCache(model.config), cache=VisionCache(model.config))
    with pytest.raises(ValueError, match=r"^images: the cache holds a prompt already"):
        model(prompt(5, 7), images=pictures(1), past_key_values=cache)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cache_implementation", "static"),
        ("cache_implementation", "quantized"),
        ("cache_implementation", "paged"),
        ("generation_config", GenerationConfig(cache_implementation="static")),
        ("assistant_model", "another model"),
        ("prompt_lookup_num_tokens", 3),
        ("guidance_scale", 1.5),
        ("negative_prompt_ids", torch.ones(1, 3)),
        ("custom_generate", "somebody/loop"),
        ("prefill_chunk_size", 16),
        ("labels", torch.ones(1, 3)),
        ("position_ids", torch.ones(1, 3)),
        ("inputs_embeds", torch.ones(1, 3, 64)),
    ],
    ids=str,
)
def test_what_generate_cannot_do_is_refused_by_name(field, value):
    name = "cache_implementation" if field == "generation_config" else field
    with pytest.raises(ValueError, match=rf"^{name}: [^\n]+$"):
        generate(**{field: value})


def test_a_prompt_of_another_shape_is_refused():
    for ids in (None, prompt(5, 7)[0]):
        with pytest.raises(ValueError, match=r"^inputs: got .+, expected prompt ids \[batch, length\]$"):
            ours().generate(ids, images=pictures(1))
    for given in ({}, {"input_ids": prompt(5, 7, 0), "inputs_embeds": torch.ones(1, 3, 64)}):
        with pytest.raises(ValueError, match="^input_ids: give either"):
            ours()(**given)


@pytest.mark.parametrize(
    ("ids", "given", "says"),
    [
        (
            prompt(5, 7),
            {"attention_mask": torch.ones(1, 3)},
            r"attention_mask: has shape \[1, 3\], expected .* \[1, 14\]",
        ),
        (torch.tensor([[1, 5, 128, -200]]), {}, "input_ids: got 128, expected ids from 0 to 127, or -200 for an image"),
        (torch.tensor([[1, -201, -200]]), {}, "input_ids: got -201, expected"),
        (prompt(5, 7), {"images": [object()]}, "images: got object, expected tensors as process_images"),
        (prompt(5, 7), {"images": torch.ones(1, 168, 168)}, r"images: got one of shape \[168, 168\], expected"),
        (prompt(5, 7), {"images": torch.ones(1, 1, 168, 168)}, r"images: got one of shape \[1, 168, 168\], expected"),
        (prompt(5, 7), {"images": pictures(2)}, "images: got 2, but the prompts have 1 <image> tokens"),
        (
            prompt(5, 7, 2),
            {"images": [torch.ones(3, 168, 168), torch.ones(3, 84, 84)]},
            r"images: got sizes \[\(84, 84\), \(168, 168\)\] in one batch",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_one_line(ids, given, says):
    for call in (ours(), lambda *args, **kwargs: ours().generate(*args, max_new_tokens=1, **kwargs)):
        with pytest.raises(ValueError, match=rf"^{says}[^\n]*$"):
            call(ids, **{"images": pictures(1)} | given)


def test_max_length_counts_the_images():
    positions = 1 + 5 + PATCHES + 7
    with pytest.raises(ValueError, match=rf"^max_length: got 50, but the prompt alone has {positions} positions"):
        generate(max_length=50, max_new_tokens=None)
    with pytest.raises(ValueError, match="^max_length: got 50"):
        generate(max_new_tokens=None, generation_config=GenerationConfig(max_length=50, eos_token_id=2, pad_token_id=0))
    assert generate(max_length=positions + 3, max_new_tokens=None, min_new_tokens=3).shape == (1, 3)


def test_more_positions_than_the_model_has_learned_are_said_once(warnings, monkeypatch):
    model = ours()
    monkeypatch.setattr(model.config, "max_position_embeddings", 1 + 5 + PATCHES + 7 + 4)
    generate(model, max_new_tokens=4)
    assert warnings == []
    generate(model, max_new_tokens=5)
    assert len(warnings) == 1 and "162 new" not in warnings[0] and "takes 157 positions" in warnings[0]
    with load_reducer({"method": "visionzip", "compat": "official", "retain": 40}).on(model):  # renumbers: 40 are left
        generate(model, max_new_tokens=5)
    assert len(warnings) == 1
    model(prompt(20, 30), images=pictures(1))
    assert len(warnings) == 2
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "rope_parameters", {"rope_type": "linear", "factor": 2.0})
        assert position_limit(model.config) == 2 * model.config.max_position_embeddings


def test_attention_probabilities_need_eager_attention():
    with pytest.raises(ValueError, match="^output_attentions: sdpa attention makes no probabilities"):
        ours()(prompt(5, 7), images=pictures(1), output_attentions=True)
    with pytest.raises(ValueError, match="^output_attentions: sdpa"):
        generate(output_attentions=True, return_dict_in_generate=True)
    output = generate(ours("eager"), output_attentions=True, output_hidden_states=True, return_dict_in_generate=True)
    length = 1 + 5 + PATCHES + 7
    assert [layer.shape for layer in output.attentions[0]] == [(1, 4, length, length)] * LAYERS
    assert [layer.shape for layer in output.attentions[1]] == [(1, 4, 1, length + 1)] * LAYERS
    torch.testing.assert_close(output.attentions[1][3].sum(-1), torch.ones(1, 4, 1))
    assert [len(states) for states in output.hidden_states] == [LAYERS + 1] * 4


def test_hidden_states_are_those_of_hugging_face():
    from tiny import expand_for_hugging_face, hugging_face

    ids, pixels = prompt(5, 7), pictures(1)
    with torch.no_grad():
        expected = hugging_face()(
            expand_for_hugging_face(ids, PATCHES), pixel_values=pixels, output_hidden_states=True
        ).hidden_states
        found = ours()(ids, images=pixels, output_hidden_states=True, return_dict=False)
    for one, other in zip(found[-1], expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_prefill_that_caches_nothing_is_an_error_at_once(monkeypatch):
    monkeypatch.setattr(GrowingLayer, "update", lambda self, keys, values: (keys, values))
    with pytest.raises(RuntimeError, match="^cache: layer 0 holds 0 positions after a prefill of 157$"):
        generate()


def test_a_prompt_serves_one_forward_pass():
    model = ours()
    spliced = model.splice(prompt(5, 7), images=pictures(1))
    model(inputs_embeds=spliced.embeds, prompt=spliced)
    with pytest.raises(ValueError, match="^prompt: it has been through the decoder already"):
        model(inputs_embeds=spliced.embeds, prompt=spliced)


def test_forward_hooks_on_layers_see_what_they_compute():
    model, seen = ours(), []
    handle = model.model.layers[3].register_forward_hook(lambda layer, given, output: seen.append(output.shape))
    try:
        with RETAIN.on(model) as run:
            generate(model)
    finally:
        handle.remove()
    text = 1 + 5 + 7
    assert [shape[1] for shape in seen] == [run.traces[-1].vision_tokens[3] + text, 1, 1, 1]


def test_gradient_checkpointing_computes_layers_again_and_nothing_else(monkeypatch):
    import copy

    model, ids, pixels = copy.deepcopy(ours()).train(), prompt(5, 7), pictures(1)
    labels = ids.clamp(min=0)

    def gradients():
        model.zero_grad()
        output = model(ids, images=pixels, labels=labels)
        output.loss.backward()
        return output, model.model.layers[0].mlp.up_proj.weight.grad.clone()

    plain, expected = gradients()
    model.gradient_checkpointing_enable()
    calls, layer = [], model.model.layers[2]
    compute = layer.mlp.forward
    monkeypatch.setattr(layer.mlp, "forward", lambda states: calls.append(1) or compute(states))
    again, found = gradients()
    assert len(calls) == 2
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(again.loss, plain.loss)
    assert again.to_tuple()[-1] is not None and getattr(again, "past_key_values", None) is None
