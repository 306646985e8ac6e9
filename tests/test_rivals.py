"""The other methods: what `retain` gives, what each does that the common matrix does not look at."""

from dataclasses import replace

import pytest
import torch
import yaml
from tiny import LAYERS, SIDE, batch, ours, pictures, prompt, run

from mustdrop import Reducer, available_methods, load_reducer, ops
from mustdrop import tokens as tokens_module
from mustdrop.compose import Compose
from mustdrop.hooks import Attention, ForwardState, Keep, VisionStep, VisionTokens
from mustdrop.methods.cdpruner import RIDGE, most_probable, stretched
from mustdrop.methods.divprune import most_diverse
from mustdrop.methods.smallimage import nearest_grid
from mustdrop.methods.sparsevlm_ops import density_peaks
from mustdrop.methods.tome import match

PATCHES = SIDE * SIDE
DECODER = ("fastv", "pyramiddrop", "sparsevlm")
VISION = ("visionzip", "prumerge", "tome", "divprune", "cdpruner", "random", "uniform", "avgpool", "smallimage")


def trace_of(settings: dict | Reducer, images: int = 1, model=None, seed: int = 1):
    reducer = load_reducer(settings) if isinstance(settings, dict) else settings
    inputs = {"inputs": prompt(3, 6, images, seed=seed), "images": pictures(images, seed=seed)}
    return run(model or ours(), reducer, **inputs)[2][0]


def test_all_are_known_by_name():
    assert {*DECODER, *VISION} <= set(available_methods())


# `retain`


@pytest.mark.parametrize("retain", [PATCHES, 100, 64, 30])
@pytest.mark.parametrize("method", VISION)
def test_retain_is_exact_before_the_decoder(method, retain):
    trace = trace_of({"method": method, "retain": retain})
    assert trace.vision_tokens == [retain] * LAYERS and trace.mean_tokens_official == retain


@pytest.mark.parametrize("retain", [PATCHES, 100, 64, 40])
@pytest.mark.parametrize("method", DECODER)
def test_retain_is_reached_within_rounding_in_the_decoder(method, retain):
    trace = trace_of({"method": method, "retain": retain})
    assert trace.mean_tokens_official == pytest.approx(retain, abs=1)
    assert trace.mean_tokens >= trace.mean_tokens_official


@pytest.mark.parametrize("method", [*DECODER, *VISION])
def test_retain_is_per_image(method):
    one, two = (trace_of({"method": method, "retain": 50}, images) for images in (1, 2))
    assert two.vision_tokens == [2 * count for count in one.vision_tokens]
    patches, kept = one.images[0]["patches"], two.kept["decode"][LAYERS - 1]
    assert 0 < sum(patch < patches for patch in kept) < len(kept)


@pytest.mark.parametrize(("layers", "tokens"), [(32, 576), (40, 576), (16, 576), (28, 729)])
@pytest.mark.parametrize("method", DECODER)
def test_schedules_for_every_depth_and_grid(method, layers, tokens):
    for retain in (192, 128, 64):
        reducer = load_reducer({"method": method, "retain": retain})
        assert reducer.expected(layers, tokens) == pytest.approx(retain, abs=1)
        stages = list(reducer.schedule(layers, tokens).values())
        assert stages == sorted(stages, reverse=True)


def test_published_numbers_follow_from_retain():
    fastv = load_reducer({"method": "fastv", "retain": 192}).schedule(32, 576)
    assert fastv == {1: 180}  # 166 if the layer before the drop is not counted as pruned
    pyramid = load_reducer({"method": "pyramiddrop"}).schedule(32, 576)
    assert pyramid == {7: 288, 15: 144, 23: 72}
    for retain, numbers in ((192, (162, 30)), (128, (108, 20)), (64, (54, 10))):
        assert load_reducer({"method": "visionzip", "retain": retain}).numbers == numbers
    sparse = load_reducer({"method": "sparsevlm", "version": 2, "retain": 128, "compat": "official"})
    assert sparse.schedule(32, 576) == {2: 238, 6: 108, 15: 60}


@pytest.mark.parametrize("method", DECODER)
def test_out_of_reach_is_said_before_the_model_runs(method, monkeypatch):
    model = ours(layers=32)
    monkeypatch.setattr(model, "splice", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=r"^retain is 2: it must be at least \d+ for \w+: .* all 144 tokens"):
        run(model, load_reducer({"method": method, "retain": 2}), inputs=prompt(3, 6), images=pictures(1))


@pytest.mark.parametrize("retain", [192, 128, 64])
@pytest.mark.parametrize("method", (*DECODER, *VISION))
def test_every_budget_of_the_papers_is_met_without_a_file(method, retain):
    reducer = load_reducer({"method": method}, retain=retain)
    if method in DECODER:
        assert reducer.expected(32, 576) == pytest.approx(retain, abs=0.51)
    elif method == "visionzip":  # as published: 54 + 10, 108 + 20, 162 + 30
        assert reducer.numbers == (retain * 27 // 32, retain * 5 // 32)
    else:
        assert reducer.retain == retain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "fastv", "drop_ratio": 1.0}, "drop_ratio is 1.0: it must be 0 or more and below 1"),
        ({"method": "fastv", "drop_ratio": 0.5, "retain": 64}, "retain is 64: it must be left out where drop_ratio"),
        ({"method": "fastv", "retain": 0}, "retain is 0: it must be 1 or more"),
        ({"method": "fastv", "compat": "authors"}, "compat is 'authors': it must be one of default, official"),
        ({"method": "pyramiddrop", "ratios": [0.5, 0.7, 0.1]}, r"ratios is .*: it must be shares .* do not rise"),
        ({"method": "pyramiddrop", "ratios": [0.5]}, r"ratios is \[0.5\]: it must be as many as layers, 3"),
        ({"method": "pyramiddrop", "ratios": [0.5, 0.2, 0.1], "retain": 9}, "retain is 9: it must be left out"),
        ({"method": "visionzip", "dominant": 0}, "dominant is 0: it must be 1 or more"),
        ({"method": "visionzip", "retain": 1}, "retain is 1: it must be 2 or more"),
        ({"method": "visionzip", "retain": 9, "contextual": 2}, "retain is 9: it must be left out where contextual"),
        ({"method": "sparsevlm", "version": 3}, "version is 3: it must be 1 or 2"),
        ({"method": "sparsevlm", "rank_scale": 9.0, "retain": 64}, "rank_scale is 9.0: it must be left out but"),
        ({"method": "sparsevlm", "rank_scale": -1.0}, "rank_scale is -1.0: it must be 0 or more"),
        ({"method": "sparsevlm", "keeps": [9, 8]}, r"keeps is \[9, 8\]: it must be as many as layers, 3"),
        ({"method": "sparsevlm", "keeps": [1.5, 1.0, 1.0]}, "keeps is 1.5: it must be a number of tokens or a share"),
        ({"method": "sparsevlm", "layers": [2, 6]}, r"layers is \[2, 6\]: it must be 3 without keeps"),
        ({"method": "prumerge", "neighbours": -1}, "neighbours is -1: it must be 0 or more"),
        ({"method": "prumerge", "retain": 1}, "retain is 1: it must be 2 or more"),
        ({"method": "divprune", "retain": 0}, "retain is 0: it must be 1 or more"),
        ({"method": "cdpruner", "retain": 0}, "retain is 0: it must be 1 or more"),
        ({"method": "smallimage", "retain": 0}, "retain is 0: it must be 1 or more"),
        ({"method": "random", "retain": -3}, "retain is -3: it must be 1 or more"),
    ],
)
def test_mistakes_are_one_clear_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        load_reducer(settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "fastv", "layer": 0}, "layer is 0: it must be a layer from 1 to 7"),
        ({"method": "fastv", "layer": 8}, "layer is 8: it must be a layer from 1 to 7"),
        ({"method": "pyramiddrop", "layers": [2, 4, 1.5], "retain": 50}, "layers is 1.5: it must be a layer from 1"),
        ({"method": "pyramiddrop", "layers": [4, 2, 6]}, r"layers is \[4, 2, 6\]: it must be rising"),
        ({"method": "sparsevlm", "layers": [1, 2, 8]}, "layers is 8: it must be a layer from 0 to 7"),
    ],
)
def test_layers_that_do_not_fit_are_said_before_the_model_runs(settings, message):
    with pytest.raises(ValueError, match=message), load_reducer(settings).on(ours()):
        pass


# What each method is about


def test_fastv_keeps_what_the_last_token_attends_to():
    """The same as asking an eager model for the attention of the layer before."""
    model, ids, images = ours(attn_implementation="eager"), prompt(3, 6, seed=1), pictures(1, seed=1)
    trace = trace_of({"method": "fastv", "layer": 3, "drop_ratio": 0.75})
    with torch.no_grad():
        attention = model(ids, images=images, output_attentions=True).attentions[2]
    row = attention[0].mean(0)[-1, 4 : 4 + PATCHES]
    assert trace.kept["prefill"] == {2: sorted(row.topk(PATCHES // 4).indices.tolist())}
    assert trace.vision_tokens == [PATCHES] * 3 + [PATCHES // 4] * (LAYERS - 3)


def test_pyramiddrop_shrinks_in_stages():
    trace = trace_of({"method": "pyramiddrop"})
    assert trace.vision_tokens == [144, 144, 72, 72, 36, 36, 18, 18]
    stages = [set(trace.kept["prefill"][layer]) for layer in (1, 3, 5)]
    assert stages[0] > stages[1] > stages[2]


def test_sparsevlm_without_text_after_the_image_keeps_all():
    ids = batch([prompt(3, 0), prompt(3, 6)])
    traces = run(ours(), load_reducer({"method": "sparsevlm", "retain": 60}), **ids, images=pictures(2))[2]
    assert set(traces[0].vision_tokens) == {PATCHES} and traces[1].vision_tokens[-1] < PATCHES


def test_sparsevlm_recycles_tokens_that_stand_for_what_joined_them():
    plain, recycling = (
        trace_of({"method": "sparsevlm", "version": version, "keeps": [40, 20, 9]}) for version in (2, 1)
    )
    assert plain.vision_tokens_after[:4] == [40, 20, 20, 9]
    assert recycling.vision_tokens_after[:4] == [40 + 4, 20 + 1, 20 + 1, 9 + 1]  # 32 of 104, 8 of 24, 4 of 12 joined
    patches = recycling.kept["prefill"]
    assert len(patches[0]) == 40 + 32 and len(patches[1]) > 20 + 8 and set(patches[3]) < set(patches[1])
    assert patches[3] == recycling.kept["decode"][LAYERS - 1]


def test_sparsevlm_keeps_by_rank():
    few, more = (trace_of({"method": "sparsevlm", "rank_scale": scale}) for scale in (2.0, 9.0))
    assert few.vision_tokens[-1] < more.vision_tokens[-1] < PATCHES


def test_density_peaks_finds_the_clumps():
    clumps = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]]).repeat_interleave(4, 0) + 0.1 * torch.randn(12, 2)
    real = torch.ones(1, 14, dtype=torch.bool)
    real[:, 12:] = False
    points = torch.cat([clumps, torch.zeros(2, 2)])[None]
    centres, cluster = density_peaks(points, real, torch.tensor([3]), 5)
    assert sorted((centres[0, :3] // 4).tolist()) == [0, 1, 2]
    assert all(len(set(cluster[0, start : start + 4].tolist())) == 1 for start in (0, 4, 8))


@pytest.mark.parametrize("method", DECODER)
def test_one_prompt_is_compacted_without_asking_the_device(method, monkeypatch):
    lengths = []
    original = tokens_module.compact
    monkeypatch.setattr(
        tokens_module, "compact", lambda *a, **k: (lengths.append(k.get("length")), original(*a, **k))[1]
    )
    trace_of({"method": method, "retain": 50}, images=2)
    assert lengths and None not in lengths


def test_no_other_reducer_may_drop_in_a_layer_in_which_tokens_merge():
    sparse = load_reducer({"method": "sparsevlm", "layers": [1, 2, 3], "retain": 60})
    with pytest.raises(ValueError, match="no other may drop any"):
        trace_of(Compose([sparse, load_reducer({"method": "fastv", "layer": 2})]))
    counts = trace_of(
        Compose([sparse, load_reducer({"method": "fastv", "layer": 6, "drop_ratio": 0.95})])
    ).vision_tokens
    assert counts[6] < counts[5]


def test_visionzip_stands_for_every_patch_once():
    trace = trace_of({"method": "visionzip", "dominant": 20, "contextual": 6})
    assert sorted(patch for patches in trace.tokens for patch in patches) == list(range(PATCHES))
    assert sum(len(patches) > 1 for patches in trace.tokens) <= 6
    cls_first = trace_of({"method": "visionzip", "dominant": 20, "contextual": 6, "compat": "official"})
    assert cls_first.tokens[0] == [] and sum(map(len, cls_first.tokens)) == PATCHES


def test_prumerge_counts_outliers_and_plus_adds_evenly_spaced_ones():
    few, more = (trace_of({"method": "prumerge", "plus": plus}) for plus in (False, True))
    assert 1 < len(few.tokens) < len(more.tokens) < PATCHES
    for trace in (few, more):
        assert sorted(patch for patches in trace.tokens for patch in patches) == list(range(PATCHES))
        assert sum(len(patches) > 1 for patches in trace.tokens) <= 1


def test_tome_merges_the_most_alike_and_weighs_by_size():
    trace = trace_of({"method": "tome", "retain": 40})
    assert sorted(patch for patches in trace.tokens for patch in patches) == list(range(PATCHES))
    assert trace.images[0]["blocks"] == [[0, 109], [1, 74], [2, 40]]
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.1]]])
    one, two = torch.tensor([1]), torch.tensor([2])
    assert match(keys, one).tolist() == [[3, 1, 2, 3]] and match(keys, two).tolist() == [[3, 1, 1, 3]]
    three_are_real = torch.tensor([[True, True, True, False]])
    assert match(keys, one, three_are_real).tolist() == [[0, 1, 1, 3]]


def test_tome_attends_to_a_token_of_two_patches_as_to_both():
    tower = ours().get_vision_tower()
    alike = VisionTokens.from_patches(torch.randn(1, 5, 32), (2, 2))
    alike = alike.with_hidden(alike.hidden[:, [0, 1, 1, 3, 4]])
    merged = Keep.merge(torch.tensor([[0, 0, 2, 3]]), 3).apply(alike)
    state = ForwardState(load_reducer({"method": "tome", "retain": 40}))
    block = tower.vision_tower.encoder.layers[1]
    expected = block(alike.hidden, attention_mask=None)[:, [0, 1, 3, 4]]
    torch.testing.assert_close(block(merged.hidden, attention_mask=tower._mask(merged, state)), expected)


def test_tome_says_when_blocks_are_too_few():
    with pytest.raises(ValueError, match="retain is 2: it must be at least 18: each of 3 vision blocks merges half"):
        trace_of({"method": "tome", "retain": 2})


def test_divprune_takes_one_of_each_kind_first():
    kinds = torch.eye(4).repeat_interleave(5, 0)[None] + 1e-3 * torch.randn(1, 20, 4)
    chosen = most_diverse(kinds, 4)[0].nonzero()[:, 0]
    assert sorted((chosen // 5).tolist()) == [0, 1, 2, 3]


def by_determinants(kernel: torch.Tensor, count: int) -> list[int]:
    """Greedy search by its definition: again and again the token with which the determinant is largest."""
    chosen: list[int] = []
    for _ in range(count):
        others = [token for token in range(len(kernel)) if token not in chosen]
        chosen.append(max(others, key=lambda token: kernel[[*chosen, token]][:, [*chosen, token]].det().item()))
    return sorted(chosen)


def test_cdpruner_is_greedy_in_the_determinant():
    features, relevance = torch.randn(3, 20, 8, dtype=torch.double), torch.rand(3, 20, dtype=torch.double)
    valid = torch.arange(20) < torch.tensor([20, 20, 13])[:, None]
    chosen = most_probable(features, relevance, 9, valid)
    for row, count in enumerate(valid.sum(-1).tolist()):
        kernel = features[row] @ features[row].T + RIDGE * relevance[row].square().diag()
        assert chosen[row].nonzero()[:, 0].tolist() == by_determinants(kernel[:count, :count], 9)


def test_cdpruner_weighs_likeness_by_what_the_question_is_about():
    tokens = VisionTokens.from_patches(torch.randn(2, 20, 12), (4, 5), prefix=0)
    question, real = torch.randn(2, 4, 12), torch.arange(4) < torch.tensor([[2], [4]])
    step = VisionStep(tokens, instruction=question, real=real)
    kept = load_reducer({"method": "cdpruner", "retain": 4}).on_instruction(step).apply(tokens)
    for row, length in enumerate((2, 4)):
        units, text = (torch.nn.functional.normalize(one[row]) for one in (tokens.hidden, question))
        relevance = torch.stack([(unit * text[:length]).sum(-1).mean() for unit in units])
        relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
        kernel = relevance[:, None] * (units @ units.T) * relevance + RIDGE * relevance.square().diag()
        assert kept.patch_index[row].tolist() == by_determinants(kernel.double(), 4)
    assert stretched(torch.zeros(1, 4)).tolist() == [[1.0] * 4]


def test_cdpruner_asks_every_prompt_about_a_shared_picture():
    picture = pictures(1, seed=1)[0]
    ids = [prompt(3, 6, seed=seed) for seed in (1, 5)]
    reducer = load_reducer({"method": "cdpruner", "retain": 20})
    traces = run(ours(), reducer, **batch(ids), images=[picture, picture])[2]
    assert traces[0].tokens != traces[1].tokens
    for trace, alone in zip(traces, ids, strict=True):
        assert trace.tokens == run(ours(), reducer, inputs=alone, images=picture[None])[2][0].tokens


def test_smallimage_sees_the_whole_picture_in_fewer_patches():
    trace = trace_of({"method": "smallimage", "retain": 50})
    assert trace.images == [{"patches": 49, "views": 1, "tokens": 49, "tokens_per_view": [49.0], "blocks": []}]
    assert trace.vision_tokens == [49] * LAYERS
    ramp = torch.arange(168.0).expand(1, 3, 168, 168) - 3 * torch.arange(168.0)[:, None]
    smaller = load_reducer({"method": "smallimage", "retain": 36}).on_pixels(ramp, 14)
    every_other = torch.nn.functional.avg_pool2d(ramp, 2)
    torch.testing.assert_close(smaller[..., 4:-4, 4:-4], every_other[..., 4:-4, 4:-4])


@pytest.mark.parametrize(
    ("grid", "count", "expected"),
    [((24, 24), n, sides) for n, sides in ((192, (14, 14)), (128, (11, 12)), (64, (8, 8)), (32, (5, 6)), (1, (1, 1)))]
    + [((12, 48), 64, (4, 16)), ((24, 24), 575, (24, 24))],
)
def test_smaller_grids_come_as_near_as_they_can(grid, count, expected):
    assert nearest_grid(grid, count) == expected


def test_random_is_seeded_and_the_same_for_a_picture_everywhere():
    first, again, other = (trace_of({"method": "random", "retain": 30, "seed": seed}).tokens for seed in (1, 1, 2))
    assert first == again != other


def test_average_pooling_averages():
    tokens = VisionTokens.from_patches(torch.randn(2, 17, 5), (4, 4))
    pooled = load_reducer({"method": "avgpool", "retain": 4}).reduce(tokens).apply(tokens)
    expected = torch.nn.functional.avg_pool2d(tokens.patches.transpose(1, 2).reshape(2, 5, 4, 4), 2)
    torch.testing.assert_close(pooled.patches, expected.flatten(2).transpose(1, 2))
    assert pooled.patch_to_token[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]


@pytest.mark.parametrize(("grid", "count"), [((24, 24), 64), ((24, 24), 192), ((5, 7), 1), ((3, 3), 9), ((6, 4), 17)])
def test_grid_cells_are_as_many_as_asked_and_even(grid, count):
    cell, middle = ops.grid_cells(grid, count, torch.device("cpu"))
    sizes = torch.bincount(cell, minlength=count)
    assert len(sizes) == count and sizes.min() >= 1 and sizes.max() <= 4 * sizes.min()
    assert torch.equal(cell[middle], torch.arange(count))


def test_merge_keeps_places_and_takes_means():
    tokens = VisionTokens.from_patches(torch.arange(8.0).view(1, 8, 1), (2, 4), prefix=0)
    merged = Keep.merge(torch.tensor([[0, 0, 2, 3, 3, 3, 6, 7]]), 5).apply(tokens)
    assert merged.hidden[0, :, 0].tolist() == [0.5, 2, 4, 6, 7]
    assert merged.patch_to_token[0].tolist() == [0, 0, 1, 2, 2, 2, 3, 4]
    assert merged.patch_index[0].tolist() == [0, 2, 3, 6, 7]


def on_meta(*shape: int) -> torch.Tensor:
    """A tensor without contents: whatever has to look at them fails."""
    return torch.empty(*shape, device="meta")


@pytest.mark.parametrize("method", [*VISION[:-1], "visionzip compat official", "prumerge plus true"])
def test_the_host_waits_for_no_choice_in_the_tower(method):
    method, *option = method.split()
    settings = {option[0]: yaml.safe_load(option[1])} if option else {}
    reducer = load_reducer({"method": method, "retain": 30, **settings})
    tokens = VisionTokens.from_patches(on_meta(2, 145, 32), (12, 12))
    attention = Attention(lambda rows: on_meta(2, 4, rows.shape[1], 8), lambda: on_meta(2, 4, 145, 8), 1.0)
    step = VisionStep(tokens, block=2, blocks=4, run=3, attention=attention, next_attention=attention)
    if method in ("divprune", "cdpruner"):
        real = torch.ones(2, 6, dtype=torch.bool, device="meta")
        step = VisionStep(tokens.without_prefix(), instruction=on_meta(2, 6, 32), real=real)
    hook = reducer.counts_at
    reducer = replace(reducer, retain=80) if method == "tome" else reducer
    after = getattr(reducer, hook)(step).apply(step.tokens)
    assert after.hidden.device.type == "meta" and after.patch_index.shape[1] == (80 if method == "tome" else 30)
