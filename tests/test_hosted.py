"""Transformers' own multimodal classes under every method: one matrix, a row per family."""

import pytest
import stock
import tiny
import torch
from hosted import FAMILIES, METHODS, ON_DEMAND, ROWS, KeepAll, facts, reducer_of
from stock import alone, generate, ids_of, inputs

import llava  # noqa: F401  (it hosts stock models)
from mustdrop import Reducer, load_reducer
from mustdrop.hooks import Keep

IN_VIEWS = [*FAMILIES[1:4], ("qwen2.5 clips", "qwen2"), ("qwen3 clips", "qwen3"), ("internvl", "llama")]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


class Half(Reducer):
    """Drops every other vision token after a layer."""

    def after_decoder_layer(self, step):
        return Keep.where(step.tokens.vision_index % 2 == 0) if step.layer == 1 else None


@pytest.mark.parametrize(("family", "text"), ROWS)
def test_keeping_all_equals_the_stock_model(family, text):
    model = stock.stock(family, text)
    given = inputs(family, model)
    valid = given["attention_mask"].bool()
    logits, (ids, steps) = model(**given).logits, generate(model, given)
    with KeepAll().on(model):
        torch.testing.assert_close(model(**given).logits[valid], logits[valid], atol=2e-6, rtol=0)
        found, hosted = generate(model, given)
    assert torch.equal(found, ids)
    torch.testing.assert_close(hosted, steps, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("family", "text"), ROWS)
def test_half_of_the_tokens_dropped_equals_the_stock_model_with_them_masked(family, text):
    model = stock.stock(family, text)
    given = inputs(family, model)
    with Half().on(model) as run, KeepAll().on(model) as whole:
        model(**given)
    with Half().on(model):
        logits = model(**given).logits[:, -1]
    mask = given["attention_mask"].bool()
    extras = whole.traces[0].text_tokens - int(mask[0].sum())  # newlines and CLS count as text
    assert run.traces == [] and extras <= 0
    dropped = _every_other(model, given)
    causal = torch.ones(mask.shape[1], mask.shape[1]).tril().bool() & mask[:, None]
    if text == "sliding":  # the window counts what was dropped
        place = mask.cumsum(-1)
        causal &= place[..., None] - place[:, None] < model.config.text_config.sliding_window
    causal |= torch.eye(mask.shape[1]).bool()
    seen = torch.where(causal & ~dropped[:, None], 0.0, torch.finfo(torch.float32).min)[:, None]

    def masked(layer, args, kwargs):
        return args, {**kwargs, "attention_mask": seen}

    handles = [
        layer.register_forward_pre_hook(masked, with_kwargs=True) for layer in model.model.language_model.layers[2:]
    ]
    try:
        expected = model(**given).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(logits, expected, atol=5e-6, rtol=0)
    assert (expected - model(**given).logits[:, -1]).abs().max() > 1e-2


def _every_other(model, given) -> torch.Tensor:
    """Positions of the vision tokens that `Half` drops, from what the reducer is shown."""
    found = []

    class Look(Reducer):
        def after_decoder_layer(self, step):
            if step.layer == 0:
                found.append(step.tokens.vision & (step.tokens.vision_index % 2 == 1))

    with Look().on(model):
        model(**given)
    return found[0]


@pytest.mark.parametrize(("family", "text"), [*FAMILIES, ("qwen3 clips", "qwen3")])
def test_windows_of_yopo_equal_the_stock_model_with_all_else_masked(family, text):
    model = stock.stock(family, text)
    given = alone(inputs(family, model), 0)
    records = []

    class Look(Reducer):
        def after_decoder_layer(self, step):
            records.append(step.tokens)

    with Look().on(model):
        model(**given)
    tokens = records[0]
    vision, row, column = (part[0] for part in (tokens.vision, tokens.row, tokens.column))
    length = len(row)
    seen = torch.ones(length, length).tril().bool()
    near = (row[:, None] - row).abs().maximum((column[:, None] - column).abs()) <= 1
    seen[vision] = (seen[vision] & ~vision) | (near[vision] & vision)
    grids = len(row[vision].div(1024, rounding_mode="floor").unique())
    assert grids == {"next": 2, "onevision": 2, "video": 4, "qwen3 clips": 3, "internvl": 4}.get(family, 1)
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    position = stock.positions(model, given)
    expected = model(**{**given, "attention_mask": mask, "position_ids": position}).logits
    with load_reducer({"method": "yopo", "window": 3}).on(model):
        logits = model(**given).logits
    torch.testing.assert_close(logits, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_hosted_llava_equals_our_own(name, strategy):
    theirs, ours = (make(strategy=strategy, side=stock.SIDE) for make in (tiny.hugging_face, tiny.ours))
    prompts, images = [tiny.prompt(4, 7), tiny.prompt(2, 9, images=2, seed=1)], tiny.pictures(3, stock.SIDE)
    patches = stock.SIDE**2 + (strategy == "full")
    _, logits, traces = tiny.run(ours, reducer_of(name), images=images, **tiny.batch(prompts))
    given = tiny.batch([tiny.expand_for_hugging_face(ids, patches) for ids in prompts])
    with reducer_of(name).on(theirs) as run:
        _, hosted = generate(theirs, {**given, "pixel_values": images})
    assert torch.equal(hosted, logits)
    expected = [{key: value for key, value in trace.to_dict().items() if key != "times_ms"} for trace in traces]
    assert facts(run) == expected


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("family", "text"), FAMILIES[1:])
def test_every_method_runs_and_its_trace_adds_up(family, text, name):
    model = stock.stock(family, text)
    given = inputs(family, model)
    with reducer_of(name).on(model) as run:
        _, logits = generate(model, given)
    assert logits.isfinite().all() and len(run.traces) == len(logits)
    for trace in run.traces:
        assert all(a >= b for a, b in zip(trace.vision_tokens, trace.vision_tokens_after, strict=True))
        assert sum(image["tokens"] for image in trace.images) == trace.vision_tokens[0]
        patches = sum(image["patches"] for image in trace.images)
        assert all(0 <= patch < patches for own in trace.tokens for patch in own)
        assert all(0 <= patch < patches for stage in trace.kept.values() for own in stage.values() for patch in own)
        assert (trace.vision_tokens_after[-1] < patches) == (name != "vanilla")
        assert all(0 < length <= trace.vision_tokens[0] + trace.text_tokens for length in trace.cache_lengths)


@pytest.mark.parametrize("name", ON_DEMAND)
@pytest.mark.parametrize(("family", "text"), FAMILIES)
def test_a_batch_of_images_of_different_size_equals_its_prompts_alone(family, text, name):
    model = stock.stock(family, text)
    given = inputs(family, model)
    with reducer_of(name).on(model) as run:
        _, both = generate(model, given)
        single = [generate(model, alone(given, row))[1][0] for row in range(len(both))]
    torch.testing.assert_close(torch.stack(single), both, atol=2e-5, rtol=0)
    batch, alone_ = facts(run)[: len(both)], facts(run)[len(both) :]
    assert [one["vision_tokens"] for one in batch] == [one["vision_tokens"] for one in alone_]


@pytest.mark.parametrize(("family", "text"), FAMILIES)
def test_text_alone_and_beside_an_image(family, text):
    model = stock.stock(family, text)
    given = inputs(family, model)
    token = stock.VIDEO if family == "video" else stock.IMAGE
    words = ids_of([(3, [], 4)])
    count = int((given["input_ids"][0] == token).sum())
    mixed = {**alone(given, 0), **stock.typed(family, ids_of([(4, [], 9), (3, [(token, count)], 6)]))}
    plain, both = generate(model, words), generate(model, mixed)
    with reducer_of("mustdrop").on(model) as run:
        assert torch.equal(generate(model, words)[1], plain[1])
        reduced = generate(model, mixed)
    torch.testing.assert_close(reduced[1][0], both[1][0], atol=2e-6, rtol=0)
    assert [trace.vision_tokens[0] > 0 for trace in run.traces] == [False, False, True]


def test_images_and_videos_of_one_prompt_stand_in_its_order():
    model = stock.stock("video", "llama")
    per_frame = stock.SIDE**2 + 1
    given = {
        **ids_of([(3, [(stock.VIDEO, 2 * per_frame), (stock.IMAGE, stock.SIDE**2)], 6)]),
        "pixel_values": stock.pixels(1),
        "pixel_values_videos": stock.pixels(1, 2, seed=1),
    }
    logits = model(**given).logits
    with KeepAll().on(model) as run:
        torch.testing.assert_close(model(**given).logits, logits, atol=2e-6, rtol=0)
    assert [image["patches"] for image in run.traces[0].images] == [2 * stock.SIDE**2, stock.SIDE**2]


def mixed(family: str, model, kinds: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt about an image (`i`) or a video of four frames (`v`) for each letter, in that order."""
    side = stock.SIDE
    per_video = 4 * (side**2 + 1) if family == "video" else 4 * (side // 2) ** 2 + 1
    many = {"i": side**2 if family == "video" else stock.tokens_of(model, stock.SIZES[0]), "v": per_video}
    ids = {"i": stock.IMAGE, "v": stock.VIDEO}
    given = ids_of([(3, [(ids[kind], many[kind]) for kind in kinds], 6)], seed)
    images, videos = kinds.count("i"), kinds.count("v")
    if images and family == "video":
        given["pixel_values_images"] = stock.pixels(images)
    elif images:
        given |= {"pixel_values": stock.pixels(images, 5), "image_sizes": torch.tensor(stock.SIZES[:1] * images)}
        given["batch_num_images"] = torch.tensor([1] * images)
    return given | ({"pixel_values_videos": stock.pixels(videos, 4, seed=1)} if videos else {})


@pytest.mark.parametrize(
    "name", ["mustdrop", "mustdrop retain", "visionzip", "prumerge", "tome", "hiprune", "trevs", "evs"]
)
@pytest.mark.parametrize(("family", "text"), [("video", "llama"), ("onevision", "qwen2")])
def test_an_image_beside_a_video_is_reduced_as_alone(family, text, name):
    """Two calls of the towers in one pass: traces speak of both, and what is chosen in a tower is what it was alone."""
    model = stock.stock(family, text)
    method = reducer_of(name) if name in METHODS else load_reducer({"method": name, "retain": 40})
    traces = {}
    for kinds in ("i", "v", "iv", "vi"):
        with method.on(model) as run:
            model(**mixed(family, model, kinds))
        (traces[kinds],) = run.traces
    in_towers = ("blocks", "patches", "views")
    alone = {kind: {fact: traces[kind].images[0][fact] for fact in in_towers} for kind in "iv"}
    for kinds in ("iv", "vi"):
        for kind, image in zip(kinds, traces[kinds].images, strict=True):
            assert {fact: image[fact] for fact in in_towers} == alone[kind]
        patches = [image["patches"] for image in traces[kinds].images]
        starts = dict(zip(kinds, (0, patches[0]), strict=True))
        for block, kept in traces[kinds].kept["vision"].items():
            for kind, start in starts.items():
                own = [patch - start for patch in kept if start <= patch < start + alone[kind]["patches"]]
                assert own == traces[kind].kept["vision"][block]
        assert len(traces[kinds].tower) == sum(alone[kind]["views"] for kind in kinds)


def test_onevision_videos_and_images_that_are_blended():
    model = stock.stock("onevision", "qwen2")
    pooled = (stock.SIDE // 2) ** 2
    videos = {**ids_of([(3, [(stock.VIDEO, 4 * pooled + 1)], 6)]), "pixel_values_videos": stock.pixels(1, 4)}
    blended = stock.stock("onevision", "qwen2", vision_aspect_ratio="anyres_max_1")
    for one, given in ((model, videos), (blended, inputs("onevision", blended))):
        logits = one(**given).logits
        valid = given["attention_mask"].bool()
        with KeepAll().on(one) as run:
            torch.testing.assert_close(one(**given).logits[valid], logits[valid], atol=2e-6, rtol=0)
        full = run.traces[0].vision_tokens[0]
        for name in ("mustdrop", "visionzip", "divprune", "fastv"):
            with reducer_of(name).on(one) as run:
                assert generate(one, given)[1].isfinite().all()
            assert 0 < run.traces[0].vision_tokens_after[-1] < full


def test_several_images_of_onevision_have_one_view_each():
    model = stock.stock("onevision", "qwen2")
    given = {
        **ids_of([(3, [(stock.IMAGE, stock.SIDE**2 + 1)] * 2, 6)]),
        "pixel_values": stock.pixels(2, 5),
        "image_sizes": torch.tensor(stock.SIZES),
        "batch_num_images": torch.tensor([2]),
    }
    logits = generate(model, given)[1]
    with KeepAll().on(model) as run:
        assert torch.equal(generate(model, given)[1], logits)
    assert [image["tokens"] for image in run.traces[0].images] == [stock.SIDE**2] * 2


VIDEOS = [("video", "llama"), ("onevision", "qwen2"), ("qwen2 clips", "qwen2"), ("qwen2.5 clips", "qwen2")]


def _four_frames(family: str) -> tuple[dict, int]:
    """A prompt with a video whose third frame differs from the others, and the places of a frame."""
    if family.endswith("clips"):
        grid, places = [4, 8, 12], 24
        given = stock.qwen_inputs([(3, 6)], [grid], family)
        frames = given["pixel_values_videos"].view(4, 8 * 12, -1)
        frames[[1, 3]] = frames[0].clone()
        return given, places
    places, extra = (stock.SIDE**2, 4) if family == "video" else ((stock.SIDE // 2) ** 2, 1)
    still = stock.pixels(1, 4)[:, :1].repeat(1, 4, 1, 1, 1)
    still[:, 2] = stock.pixels(1, 1, seed=1)[:, 0]
    ids = ids_of([(3, [(stock.VIDEO, 4 * places + extra)], 6)])
    return {**ids, "pixel_values_videos": still}, places


@pytest.mark.parametrize(("family", "text"), VIDEOS)
def test_methods_for_videos_choose_among_frames(family, text):
    model = stock.stock(family, text)
    given, places = _four_frames(family)
    for name, count in (("evs", 3 * places), ("vidcom2", 2 * places)):
        with load_reducer({"method": name, "retain": count}).on(model) as run:
            generate(model, given)
        stands = [patch // places for own in run.traces[0].tokens for patch in own]
        assert len(stands) == count
        if name == "evs":
            assert set(stands) == {0, 2, 3}  # the second frame repeats the first


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "random", "uniform", "avgpool"])
@pytest.mark.parametrize(("family", "text"), IN_VIEWS)
def test_what_chooses_in_the_tower_counts_an_image_with_all_its_views(family, text, name):
    model = stock.stock(family, text)
    with load_reducer({"method": name, "retain": 15}).on(model) as run:
        generate(model, inputs(family, model))
    images = [image for trace in run.traces for image in trace.images]
    assert min(image["views"] for image in images) > 1 and {image["tokens"] for image in images} == {15}
