"""MustDrop told numbers instead of thresholds: exact counts, the same choice, and nothing that waits for the device."""

import copy
import math
from collections import Counter

import pytest
import torch
from tiny import LAYERS, SIDE, batch, ours, pictures, prompt, run

from mustdrop import MustDrop, MustDropPlus, Reducer, load_reducer
from mustdrop.compose import Compose
from mustdrop.hooks import ForwardState, Keep, VisionStep, VisionTokens
from mustdrop.macs import mean_tokens_official
from mustdrop.methods import FastV
from mustdrop.stages import DiverseTokens, DualAttentionFilter, KeyTokens, LocalSpatialMerge, OutputAwareCache
from mustdrop.stages.budget import filter_schedule, windows_to_merge

PATCHES = SIDE * SIDE
EXACT = {"budget": [60, 41, 30, 20], "merge_to": 104}
THRESHOLDS = {"global_threshold": 0.01, "individual_threshold": 0.03}
ALIKE = [prompt(3, 6, seed=1), prompt(6, 2, seed=2), prompt(2, 9, seed=3)]
MIXED = [prompt(3, 6, seed=1), prompt(6, 2, images=2, seed=2), prompt(4, 3, images=0, seed=3)]
OPTIONS = {
    "explicit": EXACT,
    "shares": {"budget": [0.5, 0.3, 0.2, 0.1], "merge_to": 0.7},
    "unmerged": {"budget": [60, 41, 30, 20]},
    "solved": {"retain": 40},
    "solved, not diverse": {"retain": 40, "diverse": PATCHES},
    "thresholds on diverse tokens": {**THRESHOLDS, "diverse": 70},
    "official": {**EXACT, "compat": "official", "filter_layers": [1, 3, 4, 5]},
    "half precision scores": {**EXACT, "score_dtype": "model"},
    "decode threshold": {**EXACT, "output_threshold": 0.004},
    "solved, covering": {"retain": 40, "diverse": 70, "entrance": "coverage"},
    "solved, covering, small windows": {"retain": 40, "diverse": 70, "entrance": "coverage", "window": 2},
    "all caches": {**EXACT, "cache_from": 0},
    "filter alone": {"budget": [60, 41, 30, 20], "stages": ["prefill"]},
    "merging alone in numbers": {"merge_to": 104, **THRESHOLDS},
}
options = pytest.mark.parametrize("settings", OPTIONS.values(), ids=OPTIONS)


def trace_of(reducer: Reducer, images: int = 1, seed: int = 1, after: int = 6):
    return run(ours(), reducer, inputs=prompt(3, after, images, seed=seed), images=pictures(images, seed=seed))[2][0]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("seed", [1, 2])
def test_counts_are_exact(images, seed):
    trace = trace_of(MustDrop(**EXACT), images, seed)
    expected = [104, 60, 41, 30, 20, 20, 20, 20]
    assert trace.vision_tokens == [images * count for count in expected]
    text = trace.text_tokens
    assert trace.cache_lengths == [images * 20 + text] * LAYERS
    assert Counter(len(patches) for patches in trace.tokens) == {1: images * 99, 9: images * 5}
    assert len(trace.key_tokens) == images * math.ceil(0.08 * 104)
    keys = {patch for token in trace.key_tokens for patch in trace.tokens[token]}
    assert keys <= set(trace.kept["prefill"][3])


@pytest.mark.parametrize("retain", [20, 40, 77, 143])
def test_retain_is_the_mean_per_layer_by_the_authors_meter(retain):
    trace = trace_of(load_reducer({"method": "mustdrop_plus", "retain": retain}))
    assert trace.mean_tokens_official == pytest.approx(retain, abs=0.5)


@pytest.mark.parametrize(("layers", "patches"), [(32, 576), (40, 576), (16, 576), (8, 144), (24, 256), (32, 2880)])
@pytest.mark.parametrize("share", [0.07, 0.11, 0.33, 0.9])
def test_retain_is_met_at_any_depth_and_number_of_patches(layers, patches, share):
    retain, reducer = round(share * patches), MustDropPlus(retain=round(share * patches))
    reducer.check_tokens(layers, patches)
    merge, keys, diverse, chosen, _ = reducer.parts
    entering = min(merge.merged(patches), diverse.count)
    schedule = chosen.schedule(layers, patches, entering, keys.protects((1, patches), merge.merged(patches)))
    counts = [entering]
    for layer in range(layers):
        counts.append(schedule.get(layer, counts[-1]))
    assert counts == sorted(counts, reverse=True) and retain <= entering <= patches
    assert counts[-1] >= math.ceil(keys.rate * merge.merged(patches))
    assert mean_tokens_official(counts[:-1]) == pytest.approx(retain, abs=0.5)


@pytest.mark.parametrize(
    "compat", [{}, {"compat": "official", "filter_layers": [0, 1, 2, 3], "score_dtype": "float32"}]
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_counts_of_threshold_mode_give_its_choice(compat, seed):
    """The numbers rank tokens by the thresholds' own measure."""
    given = {"inputs": prompt(3, 6, seed=seed), "images": pictures(1, seed=seed)}
    _, logits, (trace,) = run(ours(), MustDrop(**THRESHOLDS, **compat), **given)
    counts = {"budget": trace.vision_tokens[1:5], "merge_to": trace.vision_tokens[0]}
    assert counts["budget"][-1] < counts["merge_to"] < PATCHES
    _, same_logits, (same,) = run(ours(), MustDrop(**THRESHOLDS, **compat, **counts), **given)
    assert same.kept["decode"] == trace.kept["decode"] and same.tokens == trace.tokens
    assert same.kept["prefill"].items() <= trace.kept["prefill"].items()
    assert same.vision_tokens == trace.vision_tokens and same.cache_lengths == trace.cache_lengths
    torch.testing.assert_close(logits, same_logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "reducer", [MustDrop(retain=PATCHES), MustDrop(budget=[PATCHES] * 4), MustDrop(budget=[1.0] * 4)]
)
def test_keeping_everything_equals_plain_llava(reducer):
    for ids, images in ((ALIKE[0], 1), (MIXED[1], 2)):
        given = {"inputs": ids, "images": pictures(images, seed=1)}
        plain, same = run(ours(), Reducer(), **given), run(ours(), reducer, **given)
        assert torch.equal(plain[1], same[1]) and plain[2][0].cache_bytes == same[2][0].cache_bytes
        assert not same[2][0].key_tokens or reducer.retain is None


@options
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prompts", [ALIKE, MIXED], ids=["padded", "several images and none"])
def test_batch_equals_one_by_one(settings, attention, prompts):
    model, reducer = ours(attn_implementation=attention), MustDrop(**settings)
    numbers = [int((ids == -200).sum()) for ids in prompts]
    images = [pictures(number, seed=seed) for seed, number in enumerate(numbers) if number]
    ids, logits, traces = run(model, reducer, **batch(prompts), images=torch.cat(images))
    images = [images.pop(0) if number else None for number in numbers]
    for row, (own, pixels) in enumerate(zip(prompts, images, strict=True)):
        alone_ids, alone_logits, (alone,) = run(model, reducer, inputs=own, images=pixels)
        assert traces[row].vision_tokens == alone.vision_tokens and traces[row].kept == alone.kept
        assert traces[row].cache_lengths == alone.cache_lengths and traces[row].tokens == alone.tokens
        assert torch.equal(ids[row], alone_ids[0])
        torch.testing.assert_close(logits[row], alone_logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        EXACT,
        {"retain": 40},
        OPTIONS["solved, covering"],
        {**EXACT, "merge_order": "score", "positions": "renumber"},
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "prompts", [ALIKE[:1] * 2, ALIKE, MIXED[1:2], MIXED], ids=["alike", "padded", "two images", "mixed"]
)
@torch.no_grad()
def test_nothing_waits_for_the_device(settings, side, prompts):
    """On tensors without data, whatever the host would have to read cannot be read."""
    model, reducer = ours(attn_implementation="eager"), MustDrop(**settings)
    images = pictures(sum(int((ids == -200).sum()) for ids in prompts))
    given = batch(prompts, side)
    state = ForwardState(reducer)
    empty = copy.deepcopy(model).to("meta")
    encoded = empty.encode_images(images.to("meta"), state)
    with reducer.on(model):
        ready = model.splice(given["inputs"], given["attention_mask"], images=images, padding_side=side)
    assert encoded.hidden.shape[1] == ready.state.images[0][0][0]
    tokens = ready.tokens.map(lambda value: value.to("meta"))
    output = empty(inputs_embeds=ready.embeds.to("meta"), prompt=ready_for(ready, tokens), use_cache=True)
    kept = [layer.keys.shape[2] for layer in output.past_key_values.layers]
    with reducer.on(model):
        cache = model(inputs_embeds=ready.embeds, prompt=ready_for(ready, ready.tokens), use_cache=True).past_key_values
    assert kept == [layer.keys.shape[2] for layer in cache.layers] and kept[0] < tokens.image.shape[1]


def ready_for(prompt_, tokens):
    """A spliced prompt with a call of its own that has seen the same images."""
    state = ForwardState(prompt_.state.reducer)
    state.images, state.views, state.scratch = (
        prompt_.state.images,
        prompt_.state.views,
        copy.deepcopy(prompt_.state.scratch),
    )
    return type(prompt_)(prompt_.embeds.to(tokens.image.device), tokens, None, state)


def test_without_text_after_the_image_the_last_token_judges():
    assert trace_of(MustDrop(**EXACT), after=0).vision_tokens == trace_of(MustDrop(**EXACT)).vision_tokens
    assert trace_of(MustDrop(**THRESHOLDS), after=0).kept["prefill"] == {}


def test_under_compose_the_count_is_passed_on_and_the_others_drop_too():
    class All(Reducer):
        def after_decoder_layer(self, step):
            return Keep.where(torch.ones_like(step.tokens.vision))

    inner = DualAttentionFilter(budget=[60, 41, 30, 20])
    for parts in ((inner,), (inner, All()), (All(), inner)):
        assert trace_of(Compose(parts)).vision_tokens[1:5] == [60, 41, 30, 20]


def test_after_merging_by_threshold_images_that_have_fewer_tokens_keep_them():
    reducer = Compose([LocalSpatialMerge(), KeyTokens(), DualAttentionFilter(budget=[90, 41, 30, 20])])
    images = pictures(2, seed=1)
    for given in ({"inputs": MIXED[1], "images": images}, {**batch(ALIKE[:2]), "images": images}):
        traces = run(ours(), reducer, **given)[2]
        for trace in traces:
            entered = [image["tokens"] for image in trace.images]
            assert trace.vision_tokens[1] == sum(min(90, count) for count in entered)
            assert trace.vision_tokens[4] == 20 * len(entered)


def test_two_reducers_that_cut_the_cache_keep_what_both_do():
    cut = Compose([DualAttentionFilter(budget=[60, 41, 30, 20]), OutputAwareCache(), OutputAwareCache(0.5)])
    assert trace_of(cut).cache_lengths == [20 + 10] * LAYERS


def test_windows_to_merge():
    assert windows_to_merge(None, None, (24, 24), 576, 3) == 0
    assert windows_to_merge(None, 576, (24, 24), 576, 3) == 0
    assert windows_to_merge(None, 64, (24, 24), 576, 3) == 25  # 376 tokens are left
    assert windows_to_merge(None, 8, (24, 24), 576, 3) == 25
    assert windows_to_merge(None, 570, (24, 24), 576, 3) == 0
    assert windows_to_merge(0.5, None, (24, 24), 576, 3) == 36
    assert windows_to_merge(0.5, None, (20, 30), 600, 3) == 38


def test_schedule_is_as_given_or_solved():
    assert filter_schedule((2, 6), 32, 576, 376, 31, budget=(0.25, 0.125)) == {2: 144, 6: 72}
    assert filter_schedule((2, 6), 32, 576, 576, 47, retain=576) == {}
    assert filter_schedule((2, 6), 32, 576, 100, 8, retain=600) == {}
    steep, even = (filter_schedule((2, 6, 10), 32, 576, 376, 8, retain=64, taper=taper) for taper in (0.25, 1.0))
    assert steep[6] == pytest.approx(steep[2] / 2, abs=1) and steep[10] == pytest.approx(steep[2] / 4, abs=1)
    assert len(set(even.values())) == 1 and steep[10] < even[10] < steep[2]


def test_mustdrop_plus_lets_tokens_that_differ_enter_the_decoder_key_tokens_among_them():
    plain = trace_of(MustDropPlus(retain=20, diverse=PATCHES))
    diverse = trace_of(MustDropPlus(retain=20, key_rate=0.08))
    assert (plain.vision_tokens[0], diverse.vision_tokens[0]) == (96, 40)
    assert len(diverse.key_tokens) == math.ceil(0.08 * 96) <= diverse.vision_tokens[-1]


def projected(images: int = 2, keys: int = 3, seed: int = 0) -> VisionTokens:
    """Projected features of images on which a few kinds of patches repeat, the first ones being key tokens."""
    torch.manual_seed(seed)
    kinds = torch.randn(images, 9, 16).repeat_interleave(torch.tensor([30, 12, 6, 5, 4, 3, 2, 1, 1]), dim=1)
    tokens = VisionTokens.from_patches(kinds + 0.05 * torch.randn_like(kinds), (8, 8), prefix=0)
    protected = torch.arange(64).expand(images, -1) < keys
    return tokens.with_protected(protected, [keys] * images)


def entered(tokens: VisionTokens, count: int, entrance: str) -> VisionTokens:
    return DiverseTokens(count, entrance=entrance).on_projected_features(VisionStep(tokens)).apply(tokens)


def test_covering_tokens_are_as_many_as_different_ones_and_stand_better_for_the_image():
    def nearest(entrance: str) -> torch.Tensor:
        tokens = projected()
        chosen = entered(tokens, 12, entrance)
        assert chosen.known_lengths == (12, 12) and chosen.protected.sum() == 6
        units = [torch.nn.functional.normalize(one.patches, dim=-1) for one in (tokens, chosen)]
        return (units[0] @ units[1].transpose(1, 2)).amax(-1).mean(-1)

    assert (nearest("coverage") > nearest("difference")).all()


def test_the_first_covering_token_beside_the_key_tokens_is_of_the_kind_most_patches_are_of():
    tokens = projected(keys=0)
    most = entered(tokens, 2, "coverage").patch_index
    assert (most[:, 0] < 30).all() and (most[:, 1] >= 30).all()
    tokens = projected(keys=1)
    assert (entered(tokens, 2, "coverage").patch_index[:, 1] >= 30).all()
    assert entered(projected(keys=20), 5, "coverage").known_lengths == (20, 20)


def test_two_names_for_two_algorithms():
    published, ours_ = MustDrop(retain=64), MustDropPlus(retain=64)
    assert (published.key_rate, published.taper, published.diverse) == (0.08, 0.73, None)
    assert (ours_.key_rate, ours_.taper, ours_.diverse) == (0.02, 0.25, 128)
    assert MustDropPlus(retain=64, key_rate=0.04, diverse=100).parts[2].count == 100
    assert len(published.parts) + 1 == len(ours_.parts)
    trace = trace_of(MustDrop(retain=60))
    assert trace.mean_tokens_official == pytest.approx(60, abs=0.5) and trace.vision_tokens[0] == 96
    with pytest.raises(ValueError, match="^compat is 'official': it must be default"):
        MustDropPlus(compat="official")
    with pytest.raises(ValueError, match="^retain is None: it must be of type integer"):
        load_reducer({"method": "mustdrop_plus", "retain": None})


def test_text_and_key_tokens_stay_whatever_the_numbers():
    trace = trace_of(Compose([KeyTokens(0.5), FastV(layer=1, drop_ratio=0.9)]))
    assert trace.vision_tokens[4] == 72 and trace.cache_lengths[-1] == 72 + trace.text_tokens
    assert set(trace.kept["prefill"][0]) == set(trace.key_tokens)


def test_a_budget_below_the_key_tokens_of_another_reducer_is_refused():
    with pytest.raises(ValueError, match="budget is 60: it must be from 72 .key tokens are never dropped"):
        trace_of(Compose([KeyTokens(0.5), DualAttentionFilter(budget=[60, 41, 30, 20])]))


def test_a_budget_that_another_reducer_has_undercut_changes_nothing():
    first, then = FastV(layer=1, drop_ratio=0.9), DualAttentionFilter(budget=[100, 80, 60, 40])
    counts = trace_of(Compose([first, then])).vision_tokens
    assert counts == trace_of(Compose([first])).vision_tokens and counts[-1] < 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retain": 0}, r"retain is 0: it must be 1 or more"),
        ({"retain": 64, "budget": [1] * 4}, r"retain is 64: it must be left out where budget is given"),
        ({"budget": [9, 5]}, r"budget is \[9, 5\]: it must be as many numbers as there are filter layers, 4"),
        ({"budget": [9, 5, 6, 1]}, r"budget is \[9, 5, 6, 1\]: it must be numbers that do not rise"),
        ({"budget": [9, 0.5, 0.4, 0.1]}, r"budget is .*all whole or all shares"),
        ({"budget": [1.5, 1.0, 1.0, 1.0]}, r"budget is 1.5: it must be a number of tokens, or a share of the patches"),
        ({"diverse": 9, "entrance": "best"}, r"entrance is 'best': it must be"),
        ({"diverse": 0}, r"diverse is 0: it must be 1 or more"),
        ({"diverse": 9, "stages": ["prefill"]}, r"diverse is 9: it must be left out without the vision stage"),
        ({"retain": 64, "taper": 0}, r"taper is 0: it must be more than 0 and at most 1"),
        ({"merge_to": 0}, r"merge_to is 0: it must be more than 0"),
        ({"merge_to": 104, "stages": ["prefill"]}, r"merge_to is 104: it must be left out without the vision stage"),
        ({"retain": 64, "stages": ["vision"]}, r"retain is 64: it must be left out without the prefill stage"),
        ({"retain": 64, "global_threshold": 0, "individual_threshold": 0}, r"global_threshold is 0: .* more than 0"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, message):
    with pytest.raises(ValueError, match=message):
        MustDrop(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"retain": 5},
            r"retain is 5: it must be at least 8: key tokens stay, .* all 96 .*smaller merge_to, diverse or key_rate",
        ),
        (
            {"retain": 30, "merge_to": 144, "diverse": 144, "filter_layers": [4]},
            r"retain is 30: it must be at least 78",
        ),
        ({"retain": 130, "merge_to": 104}, r"retain is 130: it must be at most 104, .* or all 144; .*larger merge_to"),
        ({"merge_to": 100}, r"merge_to is 100: it must be between 16 .* and 144 .*multiple of 8 below 144"),
        ({"merge_to": 8}, r"merge_to is 8: it must be between 16 .* and 144"),
        ({"budget": [60, 41, 30, 20], "merge_to": 56}, r"budget is 60: it must be from 5 .* to 56"),
        (
            {"budget": [60, 41, 30, 8], "merge_to": 104},
            r"budget is 8: it must be from 9 \(key tokens are never dropped\)",
        ),
    ],
)
def test_what_is_out_of_reach_is_refused_before_anything_runs(settings, message):
    with pytest.raises(ValueError, match=message), MustDrop(**settings).on(ours()):
        pass


def test_layers_compile_whole_and_keep_the_same_tokens():
    """With counts fixed every layer has one shape: no graph breaks, nothing compiled again for another picture."""
    model, reducer, graphs = copy.deepcopy(ours()), MustDrop(**EXACT), []
    for layer in model.model.layers:
        layer.compile(backend="eager", dynamic=False, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=2 * LAYERS, fail_on_recompile_limit_hit=True):
        for seed in (1, 2):
            given = {"inputs": prompt(3, 6, seed=seed), "images": pictures(1, seed=seed), "new_tokens": 1}
            _, logits, (trace,) = run(model, reducer, **given)
            _, same_logits, (same,) = run(ours(), reducer, **given)
            assert trace.kept == same.kept
            torch.testing.assert_close(logits, same_logits, atol=1e-5, rtol=0)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1]
