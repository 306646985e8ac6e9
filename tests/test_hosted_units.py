"""Towers whose tokens are units of patches: attention on demand, windows, drops between blocks, deepstack."""

import math

import pytest
import stock
import torch
import torch.nn.functional as F
from hosted import QWENS, KeepAll, reducer_of
from stock import alone, generate, ids_of, inputs
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import llava  # noqa: F401  (it hosts stock models)
from llava.model.hosted.towers.attention import (
    Windows,
    attend,
    attend_in_windows,
    folded,
    key_bias,
    of_patches,
    unfolded,
)
from mustdrop import Reducer, load_reducer
from mustdrop.attention import cls_attention
from mustdrop.compose import Compose
from mustdrop.hooks import Keep, VisionTokens
from mustdrop.stages import KeyTokens

ANY_SIZE = [*QWENS, ("internvl", "llama")]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def own_attention(model, given) -> list[torch.Tensor]:
    """The stock tower's attention, block by block, mean over heads: `[patches, patches]`, zero between sequences."""
    found = []
    modules = [block.attn for block in model.model.visual.blocks]

    def noted(module, query, key, value, attention_mask, scaling, **kwargs):
        weights = (query @ key.transpose(2, 3) * scaling).softmax(-1)
        found.append((module, weights.mean(1)[0]))
        return (weights @ value).transpose(1, 2), weights

    ALL_ATTENTION_FUNCTIONS.register("noted", noted)
    model.model.visual.config._attn_implementation = "noted"
    try:
        model(**given)
    finally:
        model.model.visual.config._attn_implementation = "sdpa"
    return [torch.block_diag(*(own for of, own in found if of is module)) for module in modules]


@pytest.mark.parametrize(("family", "text"), QWENS)
def test_attention_on_demand_between_units_is_the_towers_own(family, text):
    model = stock.stock(family, text)
    given = alone(inputs(family, model), 0)
    seen = {}

    class Look(Reducer):
        def after_vision_block(self, step):
            units = step.tokens.patch_index.shape[1]
            seen[step.block] = step.attention.mean_over_heads(torch.arange(units)[None])[0]
            if step.next_attention is not None:
                seen[step.block, "next"] = step.next_attention.probabilities(torch.arange(units)[None])[0].mean(0)
            assert step.attention.keys().shape == (1, 4, units, 8)

    expected = own_attention(model, given)
    with Look().on(model):
        model(**given)
    units = len(expected[0]) // 4
    order = torch.arange(units)
    if family == "qwen2.5":  # the stock tower has its patches window by window
        order = Windows.of((6, 8), 4).order().argsort()
    for block, own in enumerate(expected):
        of_units = own.unflatten(0, (units, 4)).mean(1).unflatten(1, (units, 4)).sum(2)[order][:, order]
        torch.testing.assert_close(seen[block], of_units, atol=2e-6, rtol=0)
        if block:
            torch.testing.assert_close(seen[block - 1, "next"], of_units, atol=2e-6, rtol=0)


class Some(Reducer):
    """Drops two thirds of the units after a vision block, and shows what comes out behind the projector."""

    def __init__(self, block: int, mask: torch.Tensor):
        self.block, self.mask, self.features = block, mask, []

    def after_vision_block(self, step):
        return Keep.where(self.mask[None].expand_as(step.tokens.patch_index)) if step.block == self.block else None

    def on_projected_features(self, step):
        self.features.append(step.tokens.patches)


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize(("family", "text"), QWENS)
def test_units_dropped_between_blocks_equal_stock_blocks_on_the_others(family, text, block):
    model = stock.stock(family, text)
    given = alone(inputs(family, model), 0)
    units = int(given["image_grid_thw"].prod()) // 4
    mask = torch.rand(units, generator=torch.Generator().manual_seed(1)) < 0.34
    reducer = Some(block, mask)
    with reducer.on(model) as run:
        model(**given)
    kept = mask
    windows = Windows.of((6, 8), 4)
    if family == "qwen2.5":
        kept = mask[windows.order()]
    rows = kept.repeat_interleave(4)
    visual = model.model.visual

    def cut(index, states, args, kwargs):
        """Stock blocks behind the drop run on the patches that are left, in shorter sequences."""
        if index <= block:
            return states, kwargs
        states = states[rows] if index == block + 1 else states
        bounds = kwargs["cu_seqlens"]
        lengths = [int(rows[start:end].sum()) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]
        bounds = F.pad(torch.tensor([length for length in lengths if length]).cumsum(0), (1, 0)).int()
        tables = tuple(table[rows] for table in kwargs["position_embeddings"])
        return states, {**kwargs, "cu_seqlens": bounds, "position_embeddings": tables}

    handles = []
    for index, part in enumerate(visual.blocks):

        def hook(module, args, kwargs, index=index):
            states, kwargs = cut(index, args[0], args, kwargs)
            return (states,), kwargs

        handles.append(part.register_forward_pre_hook(hook, with_kwargs=True))
    order = torch.arange(int(mask.sum()))
    if family == "qwen2.5":
        order = windows.order()[kept].argsort()
    merged = []
    handles.append(visual.merger.register_forward_hook(lambda module, args, out: merged.append(out)))
    try:
        if family == "qwen2.5":  # what follows the merger expects all units
            with pytest.raises(IndexError):
                visual(given["pixel_values"], grid_thw=given["image_grid_thw"])
        else:
            visual(given["pixel_values"], grid_thw=given["image_grid_thw"])
    finally:
        for handle in handles:
            handle.remove()
    assert run.traces[0].vision_tokens[0] == int(mask.sum())
    torch.testing.assert_close(reducer.features[0][0], merged[0][order], atol=2e-6, rtol=0)


def test_windows_of_what_is_left_equal_attention_under_a_mask():
    generator = torch.Generator().manual_seed(0)
    grid, unit = (5, 7), 4
    windows = Windows.of(grid, 3)
    whole = VisionTokens.from_patches(torch.zeros(2, 35, 1), grid, prefix=0)
    mask = torch.rand(2, 35, generator=generator) < 0.4
    tokens = whole.select(mask, mask.sum(-1).tolist())
    patches = tokens.patch_index.shape[1] * unit
    parts = tuple(torch.randn(2, 3, patches, 8, generator=generator) for _ in range(3))
    hides = windows.hides(tokens, unit, torch.arange(patches).expand(2, -1))
    for bias in (None, torch.randn(2, 1, 1, patches, generator=generator)):
        padding = ~tokens.valid.repeat_interleave(unit, -1)[:, None, None]
        full = torch.zeros(2, 1, patches, patches) if bias is None else bias.expand(-1, -1, patches, -1)
        expected = attend(*parts, full.masked_fill(hides[:, None] | padding, torch.finfo(torch.float32).min), 0.4)
        found = attend_in_windows(parts, bias, 0.4, windows, tokens, unit)
        real = ~padding[:, 0, 0]
        assert torch.allclose(found.transpose(1, 2)[real], expected.transpose(1, 2)[real], atol=1e-6)


def test_units_and_their_patches():
    states = torch.randn(2, 1 + 12, 5)
    units = folded(states, 1, 4)
    assert units.shape == (2, 4, 20) and torch.equal(unfolded(units, 1, 4), states)
    assert of_patches(torch.tensor([[0, 2]]), 1, 4).tolist() == [[0, 0, 0, 0, 5, 6, 7, 8]]
    assert of_patches(torch.tensor([[1]]), 0, 4).tolist() == [[4, 5, 6, 7]]


@pytest.mark.parametrize(("family", "text"), [*QWENS, ("onevision", "qwen2")])
def test_images_of_one_size_that_merge_differently_are_what_they_are_alone(family, text):
    model = stock.stock(family, text)
    if family == "onevision":
        given = inputs(family, model)
        given["pixel_values"][1, :, ..., : stock.PIXELS // 3] = 0.3
    else:
        given = stock.qwen_inputs([(3, 6), (5, 9)], [stock.QWEN_GRIDS[0]] * 2, family)
        given["pixel_values"][192:] = stock.patches([[1, 12, 64]], seed=3)[-192:]
    settings = {"method": "mustdrop", "filter_layers": [1, 3], "similarity_threshold": 0.2, "key_rate": 0.3}
    with load_reducer(settings).on(model) as run:
        _, both = generate(model, given)
        single = [generate(model, alone(given, row))[1][0] for row in range(2)]
    entered = [trace.vision_tokens[0] for trace in run.traces]
    assert entered[0] != entered[1] and entered[:2] == entered[2:]
    torch.testing.assert_close(torch.stack(single), both, atol=2e-5, rtol=0)
    assert [trace.key_tokens for trace in run.traces[:2]] == [trace.key_tokens for trace in run.traces[2:]]


def test_padding_pays_no_attention():
    class Even:
        def mean_over_heads(self, rows):
            paid = torch.full((1, 3, 3), 0.5)
            paid[:, 2, 0] = 9.0
            return paid

    tokens = VisionTokens.from_patches(torch.zeros(1, 3, 1), (1, 3), prefix=0)
    tokens.valid = torch.tensor([[True, True, False]])
    assert cls_attention(Even(), tokens)[:, :2].tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(("family", "text"), QWENS)
def test_images_and_videos_of_one_prompt(family, text):
    model = stock.stock(family, text)
    clip, grids = [2, 8, 8], [[1, 8, 12], [1, 12, 8]]
    frames = [(stock.VIDEO, 16)] * 2 if family == "qwen3" else [(stock.VIDEO, 32)]
    runs = [(stock.IMAGE, 24), *frames, (stock.IMAGE, 24)]
    given = {
        **stock.typed(family, ids_of([(3, runs, 6)])),
        "pixel_values": stock.patches(grids),
        "image_grid_thw": torch.tensor(grids),
        "pixel_values_videos": stock.patches([clip], seed=1),
        "video_grid_thw": torch.tensor([clip]),
    }
    logits = generate(model, given)[1]
    with KeepAll().on(model) as run:
        torch.testing.assert_close(generate(model, given)[1], logits, atol=2e-6, rtol=0)
    assert [image["patches"] for image in run.traces[0].images] == [24, 32, 24]
    assert [image["views"] for image in run.traces[0].images] == [1, 2, 1]
    with load_reducer({"method": "uniform", "retain": 4}).on(model) as run:
        generate(model, given)
    (trace,) = run.traces
    assert [image["tokens"] for image in trace.images] == [4, 4, 4]
    assert [image["blocks"] for image in trace.images] == [[[3, 4]]] * 3
    of_images = [sum(low <= patch < low + 24 for patch in trace.kept["vision"][3]) for low in (0, 24, 56)]
    assert of_images[0] == of_images[2] == 4


def test_deepstack_of_what_is_left_before_it():
    model = stock.stock("qwen3", "qwen3")
    given = alone(inputs("qwen3", model), 0)

    class Half(Reducer):
        def on_projected_features(self, step):
            return Keep.where(step.tokens.patch_index % 2 == 0)

    vision = given["input_ids"][0] == stock.IMAGE
    dropped = vision & (vision.cumsum(0) % 2 == 0)
    length = len(vision)
    seen = torch.ones(length, length).tril().bool() & (~dropped | torch.eye(length).bool())
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    expected = model(**{**given, "attention_mask": mask, "position_ids": stock.positions(model, given)}).logits[:, -1]
    with Half().on(model) as run:
        logits = model(**given).logits[:, -1]
    assert run.traces[0].vision_tokens[0] == int(vision.sum()) // 2
    torch.testing.assert_close(logits, expected, atol=5e-6, rtol=0)
    assert (expected - model(**given).logits[:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "text"), QWENS)
def test_positions_go_on_behind_what_was_dropped(family, text):
    model = stock.stock(family, text)
    given = alone(inputs(family, model), 0)

    class Half(Reducer):
        def after_decoder_layer(self, step):
            return Keep.where(step.tokens.vision_index % 2 == 0) if step.layer == 1 else None

    with Half().on(model):
        ids, steps = generate(model, given)
        longer = stock.typed(family, {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])})
        whole = model(**{**given, **longer}).logits[:, -steps.shape[1] :]
    torch.testing.assert_close(steps, whole, atol=5e-6, rtol=0)


@pytest.mark.parametrize(("family", "text"), ANY_SIZE)
def test_what_these_models_cannot_do_is_refused_when_the_block_begins(family, text):
    class Pixels(Reducer):
        def on_pixels(self, images, patch_size):
            return None

    model = stock.stock(family, text)
    for reducer, match in (
        (Pixels(), "Pixels changes the pixels .* max_pixels"),
        (load_reducer({"method": "smallimage", "retain": 0.5}), "retain is 0.5: it must be a number of tokens"),
        (load_reducer({"method": "mustdrop", "key_block": 7}), "key_block is 7: it must be between -4 and 3"),
        (load_reducer({"method": "fastv", "layer": 40, "retain": 9}), "layer"),
    ):
        with pytest.raises(ValueError, match=match) as error, reducer.on(model):
            pass
        assert "\n" not in str(error.value) and "forward" not in vars(model.model)


def test_blocks_that_see_windows_choose_no_tokens():
    model = stock.stock("qwen2.5", "qwen2")
    for settings, field in (
        ({"method": "mustdrop", "key_block": 2}, "key_block is 2"),
        ({"method": "mustdrop", "key_block": -2, "retain": 12}, "key_block is -2"),
        ({"method": "hiprune", "retain": 12, "object_block": 0}, "object_block is 0"),
        ({"method": "compose", "parts": [{"method": "mustdrop", "key_block": 2}, {"method": "yopo"}]}, "key_block"),
    ):
        match = f"{field}.*: it must be one of 1, 3, for in block . .* window alone"
        with pytest.raises(ValueError, match=match) as error, load_reducer(settings).on(model):
            pass
        assert "\n" not in str(error.value)
        with load_reducer(settings).on(stock.stock("qwen2", "qwen2")):  # none of its blocks is windowed
            pass
    last = stock.stock("qwen2.5", "qwen2", full=(1,))
    match = "fullatt_block_indexes is .1.: it must hold 3, the last"
    for method in ("visionzip", "prumerge", "trevs"):
        with pytest.raises(ValueError, match=match), reducer_of(method).on(last):
            pass
    with reducer_of("fastv").on(last):
        pass


@pytest.mark.parametrize("block", [1, -1])
def test_key_tokens_without_cls_are_those_that_all_units_look_at(block):
    model = stock.stock("qwen2.5", "qwen2")
    given = alone(inputs("qwen2.5", model), 0)
    own = own_attention(model, given)[block]
    units = len(own) // 4
    paid = own.mean(0).unflatten(0, (units, 4)).sum(1)[Windows.of((6, 8), 4).order().argsort()]
    found = []

    class Look(Reducer):
        def on_vision_features(self, step):
            found.append(step.tokens.protected[0].nonzero()[:, 0].tolist())

    keys = KeyTokens(rate=0.2, block=block)
    with Compose([keys, Look()]).on(model):
        model(**given)
    assert found == [sorted(paid.topk(math.ceil(0.2 * units)).indices.tolist())]


def test_numbers_out_of_reach_for_an_image_are_refused_when_it_comes():
    model = stock.stock("qwen2", "qwen2")
    given = inputs("qwen2", model)
    with pytest.raises(ValueError, match="retain is 1"), load_reducer({"method": "tome", "retain": 1}).on(model):
        model(**given)
    assert "forward" not in vars(model.model.visual) and model(**given).logits.isfinite().all()


@pytest.mark.parametrize(("family", "text"), ANY_SIZE)
def test_smaller_images_are_the_processors_matter(family, text):
    """Too large ones are refused, so that no result says `smallimage` and was computed on whole images."""
    model = stock.stock(family, text)
    given = alone(inputs(family, model), 0)
    tokens = int((given["input_ids"] == stock.IMAGE).sum())
    logits = model(**given).logits
    for settings in ({"method": "smallimage"}, {"method": "compose", "parts": [{"method": "smallimage"}]}):
        for part in settings.get("parts", [settings]):
            part["retain"] = tokens
        with load_reducer(settings).on(model) as run:
            assert torch.equal(model(**given).logits, logits)
            assert generate(model, given)[1].isfinite().all()
        assert run.traces[-1].vision_tokens[0] == tokens
        for part in settings.get("parts", [settings]):
            part["retain"] = tokens - 1
        match = f"retain is {tokens - 1}: it must be {tokens} or more for the image that was given"
        with pytest.raises(ValueError, match=match), load_reducer(settings).on(model):
            model(**given)


def test_a_token_of_two_patches_counts_as_the_two_would():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 3, 8, generator=generator) for _ in range(3))
    whole = VisionTokens.from_patches(torch.zeros(1, 4, 1), (2, 2), prefix=0)
    merge_into = torch.tensor([[0, 1, 2, 1]])
    tokens = whole.select(torch.tensor([[True, True, True, False]]), [3], merge_into)
    bias = key_bias(tokens, 1, True, torch.float32)
    twice = [torch.cat([part, part[:, :, 1:2]], dim=2) for part in (key, value)]
    torch.testing.assert_close(attend(query, key, value, bias, 0.3), attend(query, *twice, None, 0.3))
    assert key_bias(whole, 1, False, torch.float32) is None
