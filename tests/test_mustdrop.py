"""MustDrop at its edges, and each way in which the default differs from the authors' code."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import LAYERS, SIDE, batch, ours, pictures, prompt, run

from mustdrop import MustDrop, Reducer, ops
from mustdrop.hooks import Attention, ForwardState, LayerPlan, VisionStep, VisionTokens
from mustdrop.stages import DualAttentionFilter, KeyTokens

PATCHES = SIDE * SIDE
WINDOWS = (SIDE // 3) ** 2
MODERATE = {"global_threshold": 0.01, "individual_threshold": 0.03}
EVERYTHING = {"global_threshold": 1e9, "individual_threshold": 1e9}


def trace_of(reducer: Reducer, images: int = 1, model=None, seed: int = 1):
    inputs = {"inputs": prompt(3, 6, images, seed=seed), "images": pictures(images, seed=seed)}
    return run(model or ours(), reducer, **inputs)[2][0]


def test_nothing_merges_and_nothing_is_dropped():
    trace = trace_of(MustDrop(0, 0, similarity_threshold=1.1))
    assert trace.vision_tokens == [PATCHES] * LAYERS
    assert trace.mean_tokens == trace.mean_tokens_official == PATCHES
    assert trace.kept["prefill"] == {layer: list(range(PATCHES)) for layer in (0, 1, 2, 3)}


def test_every_window_merges():
    trace = trace_of(MustDrop(0, 0, similarity_threshold=-1.0))
    assert trace.vision_tokens[0] == WINDOWS
    assert sorted(len(patches) for patches in trace.tokens) == [9] * WINDOWS
    assert len(trace.key_tokens) == math.ceil(0.08 * WINDOWS)


@pytest.mark.parametrize("compat", ["default", "official"])
def test_everything_but_the_key_tokens_is_dropped(compat):
    trace = trace_of(MustDrop(**EVERYTHING, compat=compat, filter_layers=[1, 3]))
    keys = sorted(patch for token in trace.key_tokens for patch in trace.tokens[token])
    assert len(trace.key_tokens) == math.ceil(0.08 * trace.vision_tokens[0])
    assert trace.kept["prefill"] == {1: keys, 3: keys}
    assert trace.vision_tokens == [trace.vision_tokens[0]] * 2 + [len(trace.key_tokens)] * (LAYERS - 2)


def test_a_single_key_token():
    trace = trace_of(MustDrop(**EVERYTHING, key_rate=1e-6))
    assert len(trace.key_tokens) == 1 and trace.vision_tokens[1:] == [1] * (LAYERS - 1)


def test_no_key_token_and_no_vision_token_left():
    trace = trace_of(MustDrop(**EVERYTHING, key_rate=0.0))
    assert trace.vision_tokens[1:] == [0] * (LAYERS - 1)
    assert trace.cache_lengths == [trace.text_tokens] * LAYERS
    assert trace.kept["prefill"][0] == []


@pytest.mark.parametrize("after", [0, 1])
def test_no_text_and_one_token_of_text_after_the_image(after):
    ids = prompt(3, after)
    _, logits, (trace,) = run(ours(), MustDrop(**MODERATE), inputs=ids, images=pictures(1, seed=1))
    assert logits.isfinite().all()
    assert (trace.vision_tokens[-1] == trace.vision_tokens[0]) == (after == 0)


def test_image_first_without_bos():
    ids = torch.tensor([[-200, 7, 9, 11]])
    _, logits, (trace,) = run(
        ours(), MustDrop(**MODERATE, compat="official", filter_layers=[1]), inputs=ids, images=pictures(1)
    )
    assert logits.isfinite().all() and trace.vision_tokens[-1] < trace.vision_tokens[0]


@pytest.mark.parametrize("side", [13, 14])
def test_the_rim_of_a_grid_that_the_window_does_not_divide_never_merges(side):
    _, _, (trace,) = run(
        ours(side=side), MustDrop(0, 0, similarity_threshold=-1.0), inputs=prompt(3, 6), images=pictures(1, side=side)
    )
    merged = [patches for patches in trace.tokens if len(patches) > 1]
    alone = [patches[0] for patches in trace.tokens if len(patches) == 1]
    assert len(merged) == (side // 3) ** 2
    assert alone == [p for p in range(side * side) if p // side >= side // 3 * 3 or p % side >= side // 3 * 3]


def test_a_grid_smaller_than_the_window():
    tokens = VisionTokens.from_patches(torch.randn(1, 5, 8), (2, 2))
    step = VisionStep(tokens, block=0, blocks=4, run=3)
    assert MustDrop().parts[0].after_vision_block(step) is None


def test_forty_layers_of_13b():
    trace = trace_of(MustDrop(**MODERATE), model=ours(layers=40))
    assert sorted(trace.kept["prefill"]) == [2, 7, 12, 17]
    assert len(trace.cache_lengths) == 40
    assert set(trace.cache_lengths[2:]) == {trace.vision_tokens[-1] + trace.text_tokens}
    assert set(trace.cache_lengths[:2]) == {trace.vision_tokens[0] + trace.text_tokens}


def test_filter_layers_as_numbers_and_as_fractions():
    numbers = trace_of(MustDrop(**MODERATE, filter_layers=[2, 6]))
    fractions = trace_of(MustDrop(**MODERATE, filter_layers=[0.25, 0.75]))
    assert sorted(numbers.kept["prefill"]) == [2, 6] and numbers.kept == fractions.kept


def test_several_images_are_judged_each_by_itself():
    """With an image of its own text, thresholds act on its share of the attention, not on all images' together."""
    attention = torch.rand(1, 2, 9) * 0.1
    image = torch.tensor([[-1, 0, 0, 0, 1, 1, 1, -1, -1]])
    both = ops.dual_attention_keep(attention, image, 2, 0.34, 1.0)
    for number in (0, 1):
        own = torch.where(image == number, 0, -1)
        alone = ops.dual_attention_keep(attention, own, 1, 0.34, 1.0)
        assert torch.equal(both[image == number], alone[image == number])


def test_several_images_lose_tokens_in_each():
    trace = trace_of(MustDrop(**MODERATE), images=2)
    last = trace.kept["prefill"][3]
    assert [image["patches"] for image in trace.images] == [PATCHES, PATCHES]
    assert 0 < sum(p < PATCHES for p in last) < PATCHES and 0 < sum(p >= PATCHES for p in last) < PATCHES


def test_an_encoder_without_cls_chooses_keys_by_the_attention_they_receive():
    tokens = VisionTokens.from_patches(torch.randn(1, 9, 8), (3, 3), prefix=0)
    keys = torch.zeros(1, 1, 9, 8)
    keys[0, 0, 4] = 5.0
    attention = Attention(lambda rows: torch.ones(1, 1, rows.shape[1], 8), lambda: keys, 1.0)
    step = VisionStep(tokens, block=3, blocks=4, run=4, attention=attention)
    keys = KeyTokens(rate=0.1).after_vision_block(step).apply(tokens)
    assert keys.keys == (1,) and keys.protected[0].nonzero()[:, 0].tolist() == [4]


# Each deviation from the authors' code is an option of its own.


def test_raster_order_is_kept_unless_asked_otherwise():
    raster = trace_of(MustDrop(**MODERATE)).tokens
    score = trace_of(MustDrop(**MODERATE, merge_order="score")).tokens
    middles = [patches[len(patches) // 2] for patches in raster]
    assert middles == sorted(middles)
    merged_first = [len(patches) for patches in score]
    assert merged_first == sorted(merged_first, reverse=True) and sorted(raster) == sorted(score)


@pytest.mark.parametrize(("option", "same"), [("per_image", False), ("batch_minimum", True)])
def test_merging_is_per_image_unless_asked_otherwise(option, same):
    reducer = MustDrop(**MODERATE, merge_count=option)
    inputs = {
        **batch([prompt(3, 6, seed=s) for s in (1, 2)]),
        "images": torch.cat([pictures(1, seed=s) for s in (1, 2)]),
    }
    traces = run(ours(), reducer, **inputs)[2]
    alone = [trace_of(reducer, seed=seed).vision_tokens[0] for seed in (1, 2)]
    assert alone[0] != alone[1]
    assert [trace.vision_tokens[0] for trace in traces] == ([max(alone)] * 2 if same else alone)


def positions_of(reducer: Reducer, new_tokens: int = 1):
    """Rotary positions per decoder layer in prefill and of the next decode step."""
    model = ours()
    with reducer.on(model):
        cache = model.generate(
            prompt(3, 6, seed=1),
            images=pictures(1, seed=1),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        ).past_key_values
    entered = [tokens.position[0].tolist() for tokens in cache.state.tokens_in]
    return entered, [cache.positions(layer, 1)[0, 0].item() for layer in range(LAYERS)], cache


def test_positions_are_those_of_the_full_prompt_unless_asked_otherwise():
    length = 4 + PATCHES + 6
    entered, following, _ = positions_of(MustDrop(**MODERATE))
    assert entered[0][-1] == length - 1 and entered[-1] == sorted(entered[-1])
    assert set(entered[-1]) < set(entered[0]) < set(range(length))
    assert following == [length] * LAYERS
    entered, _, _ = positions_of(MustDrop(**MODERATE, positions="renumber"))
    assert [positions == list(range(len(positions))) for positions in entered] == [True] * LAYERS


def test_decode_positions_continue_the_prompt_unless_asked_otherwise():
    for new_tokens in (1, 3):
        entered, following, cache = positions_of(MustDrop(**MODERATE, positions="renumber"), new_tokens)
        assert following == [positions[-1] + new_tokens for positions in entered]
        _, following, cache = positions_of(MustDrop(**MODERATE, decode_positions="cache_length"), new_tokens)
        assert following == [cache.length(layer) for layer in range(LAYERS)]


def test_scores_are_summed_in_float32_unless_asked_otherwise(monkeypatch):
    dtypes = []
    original = ops.dual_attention_keep
    monkeypatch.setattr(ops, "dual_attention_keep", lambda a, *rest: (dtypes.append(a.dtype), original(a, *rest))[1])
    for score_dtype in ("float32", "model"):
        trace_of(MustDrop(**MODERATE, filter_layers=[1], score_dtype=score_dtype), model=ours(dtype=torch.bfloat16))
    assert dtypes == [torch.float32, torch.bfloat16]


def test_cache_from_says_which_layers_forget():
    reducer = {"filter_layers": [2, 4], **MODERATE}
    published, all_layers = trace_of(MustDrop(**reducer)), trace_of(MustDrop(**reducer, cache_from=0))
    untouched = trace_of(MustDrop(**reducer, stages=["vision", "prefill"]))
    full, final = published.cache_lengths[0], published.cache_lengths[-1]
    assert published.cache_lengths == [full] * 2 + [final] * 6 and full > final
    assert all_layers.cache_lengths == [final] * LAYERS
    assert untouched.cache_lengths == [n + untouched.text_tokens for n in untouched.vision_tokens]


def test_output_threshold_keeps_forgetting_while_decoding():
    model, lengths = ours(), []
    for new_tokens in (2, 6):
        with MustDrop(**MODERATE, output_threshold=0.01).on(model):
            cache = model.generate(
                prompt(3, 6, seed=1),
                images=pictures(1, seed=1),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                return_dict_in_generate=True,
            ).past_key_values
        lengths.append([cache.length(layer) - (new_tokens - 1) for layer in range(LAYERS)])
        protected = [int((tokens.protected & tokens.vision).sum()) for tokens in cache.records]
        assert len(set(protected)) == 1 and protected[0] > 0
    assert sum(lengths[1]) < sum(lengths[0])


@pytest.mark.parametrize("stages", [["vision"], ["prefill"], ["decode"], ["vision", "decode"]])
def test_stages_alone(stages):
    trace = trace_of(MustDrop(**MODERATE, stages=stages, output_threshold=0.01))
    assert (trace.vision_tokens[0] < PATCHES) == ("vision" in stages)
    assert (trace.vision_tokens[-1] < trace.vision_tokens[0]) == ("prefill" in stages)
    shorter = trace.cache_lengths[-1] < trace.vision_tokens[-1] + trace.text_tokens
    assert shorter == ("decode" in stages)


def test_threads_can_share_a_model():
    model, reducer = ours(), MustDrop(**MODERATE)
    inputs = [{"inputs": prompt(3, 6, seed=s), "images": pictures(1, seed=s)} for s in range(6)]
    settings = {"max_new_tokens": 4, "do_sample": False}
    with reducer.on(model):
        alone = [model.generate(**given, **settings).tolist() for given in inputs]
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(lambda given: model.generate(**given, **settings).tolist(), inputs))
    assert together == alone


def test_traces_are_plain_json():
    trace = trace_of(MustDrop(**MODERATE))
    assert json.loads(json.dumps(trace.to_dict()))["vision_tokens"] == trace.vision_tokens


@torch.no_grad()
def test_a_forward_pass_without_cache_is_traced_too():
    model = ours()
    with MustDrop(**MODERATE).on(model) as record:
        model(input_ids=prompt(3, 6, seed=1), images=pictures(1, seed=1), use_cache=False)
    (trace,) = record.traces
    assert trace.vision_tokens == trace_of(MustDrop(**MODERATE)).vision_tokens
    assert trace.cache_lengths == [] and trace.cache_bytes == 0


def test_timing_is_off_unless_asked_for():
    inputs = {"images": pictures(1), "max_new_tokens": 3, "min_new_tokens": 3}
    with MustDrop().on(ours()) as record:
        ours().generate(prompt(3, 6), **inputs)
    assert record.traces[0].times_ms == {}
    with MustDrop().on(ours(), timing=True) as record:
        ours().generate(prompt(3, 6), **inputs)
    times = record.traces[0].times_ms
    assert set(times) == {"vision", "prefill", "selector", "decode"} and min(times.values()) > 0


def test_a_layer_plan_gives_vision_tokens_a_thinner_mlp():
    class Thin(Reducer):
        def before_decoder_layer(self, step):
            return LayerPlan(mlp_share=0.5) if step.layer == 1 else None

    model, layer = ours(), ours().model.layers[1]
    states = model.splice(prompt(3, 6), images=pictures(1))
    state = replace_call(states, Thin())
    got = model.model.prefill(states.embeds, states.tokens, state)
    original = layer.mlp.forward

    def masked(hidden):
        full, inner = original(hidden), layer.mlp.act_fn(layer.mlp.gate_proj(hidden)) * layer.mlp.up_proj(hidden)
        inner[..., inner.shape[-1] // 2 :] = 0
        return torch.where(states.tokens.vision[..., None], layer.mlp.down_proj(inner), full)

    layer.mlp.forward = masked
    try:
        expected = model.model.prefill(states.embeds, states.tokens, replace_call(states, Reducer()))
    finally:
        del layer.mlp.forward
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def replace_call(states, reducer: Reducer) -> ForwardState:
    state = ForwardState(reducer)
    state.images = states.state.images
    return state


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_threshold": -1.0}, r"global_threshold is -1.0: it must be 0 or more"),
        ({"window": 1}, r"window is 1: it must be an integer of at least 2"),
        ({"key_rate": 2.0}, r"key_rate is 2.0: it must be between 0 and 1"),
        ({"compat": "authors"}, r"compat is 'authors': it must be one of default, official"),
        ({"stages": ["encode"]}, r"stages is 'encode': it must be one of vision, prefill, decode"),
        ({"positions": "keep"}, r"positions is 'keep': it must be one of original, renumber"),
        ({"filter_layers": []}, r"filter_layers is \[\]: it must be at least one layer"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, message):
    with pytest.raises(ValueError, match=message):
        MustDrop(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filter_layers": [2, 8]}, r"filter_layers is 8: it must be a layer from 0 to 7"),
        ({"compat": "official"}, r"filter_layers is 10: it must be a layer from 0 to 7"),
        ({"cache_from": 9}, r"cache_from is 9: it must be a layer from 0 to 7"),
        ({"merge_block": 4}, r"merge_block is 4: it must be between 0 and 3"),
        ({"key_block": 9}, r"key_block is 9: it must be between -4 and 3"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_anything_runs(settings, message):
    with pytest.raises(ValueError, match=message), MustDrop(**settings).on(ours()):
        pass
    assert type(ours().reducer) is Reducer


def test_a_model_without_hook_points_is_refused():
    with pytest.raises(TypeError, match="Linear has no hook points"), DualAttentionFilter().on(torch.nn.Linear(1, 1)):
        pass
