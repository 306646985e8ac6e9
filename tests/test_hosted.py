"""Transformers' own multimodal classes under every method: one matrix, a row per family."""

import copy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import stock
import tiny
import torch
from stock import alone, generate, ids_of, inputs
from transformers import GenerationMixin, StoppingCriteria, TextIteratorStreamer

import llava  # noqa: F401  (it hosts stock models)
from llava.model.language_model.cache import CACHE_NAME
from mustdrop import Reducer, load_reducer
from mustdrop.hooks import Keep, hooked_model

ROWS = [
    ("llava", "llama"),
    ("llava", "mistral"),
    ("llava", "qwen2"),
    ("llava", "qwen3"),
    ("next", "llama"),
    ("next", "mistral"),
    ("onevision", "qwen2"),
    ("video", "llama"),
]
FAMILIES = [("llava", "llama"), ("next", "llama"), ("onevision", "qwen2"), ("video", "llama")]
METHODS = {
    "vanilla": {"method": "vanilla"},
    "mustdrop": {"filter_layers": [1, 3], "similarity_threshold": 0.2, "global_threshold": 0.01},
    "mustdrop official": {"method": "mustdrop", "compat": "official", "filter_layers": [1, 3]},
    "mustdrop reordered": {"method": "mustdrop", "merge_order": "score", "filter_layers": [1, 3]},
    "mustdrop retain": {"method": "mustdrop", "retain": 24, "filter_layers": [1, 3]},
    "mustdrop diverse": {"method": "mustdrop", "retain": 24, "filter_layers": [1, 3], "diverse": 30},
    "mustdrop_plus": {"retain": 24, "filter_layers": [1, 3]},
    "visionzip": {"retain": 12},
    "prumerge": {},
    "prumerge+": {"method": "prumerge", "retain": 12, "plus": True},
    "tome": {"retain": 12},
    "divprune": {"retain": 12},
    "cdpruner": {"retain": 12},
    "random": {"retain": 12},
    "uniform": {"retain": 9},
    "avgpool": {"retain": 9},
    "fastv": {"layer": 2, "drop_ratio": 0.5},
    "dart": {"layer": 2, "tokens": 12},
    "pyramiddrop": {"layers": [1, 3, 4], "ratios": [0.6, 0.4, 0.2]},
    "sparsevlm": {"layers": [1, 2, 4], "keeps": [0.6, 0.4, 0.2]},
    "sparsevlm 2": {"method": "sparsevlm", "version": 2, "layers": [1, 2, 4], "keeps": [0.6, 0.4, 0.2]},
    "yopo": {"window": 3, "heads": 0.5, "mlp_share": 0.5, "layer_cut": 5},
    "mustdrop and yopo": {
        "method": "compose",
        "parts": [
            {"method": "mustdrop", "retain": 24, "filter_layers": [1, 3]},
            {"method": "yopo", "window": 3, "heads": 0.5},
        ],
    },
    "divprune and fastv": {
        "method": "compose",
        "parts": [{"method": "divprune", "retain": 20}, {"method": "fastv", "layer": 2, "drop_ratio": 0.5}],
    },
}
ON_DEMAND = ["mustdrop", "visionzip", "prumerge", "divprune", "cdpruner", "fastv", "pyramiddrop", "yopo"]


def reducer_of(name: str) -> Reducer:
    return load_reducer({"method": name.split()[0], **METHODS[name]})


class KeepAll(Reducer):
    """Is asked everywhere and leaves everything."""

    def after_vision_block(self, step):
        return None

    def inside_vision_block(self, step):
        return None

    def after_decoder_layer(self, step):
        return None


class Half(Reducer):
    """Drops every other vision token after a layer."""

    def after_decoder_layer(self, step):
        return Keep.where(step.tokens.vision_index % 2 == 0) if step.layer == 1 else None


def facts(run) -> list[dict]:
    return [{name: value for name, value in trace.to_dict().items() if name != "times_ms"} for trace in run.traces]


def attributes(model) -> dict:
    return {name: dict(vars(part)) for name, part in model.named_modules()}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


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


@pytest.mark.parametrize(("family", "text"), FAMILIES)
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
    assert grids == {"llava": 1, "next": 2, "onevision": 2, "video": 4}[family]
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    expected = model(**{**given, "attention_mask": mask, "position_ids": torch.arange(length)[None]}).logits
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
    mixed = {**given, **ids_of([(4, [], 9), (3, [(token, count)], 6)])}
    mixed = {name: value[:1] if name not in ("input_ids", "attention_mask") else value for name, value in mixed.items()}
    plain, both = generate(model, words), generate(model, mixed)
    with reducer_of("mustdrop").on(model) as run:
        assert torch.equal(generate(model, words)[1], plain[1])
        reduced = generate(model, mixed)
    torch.testing.assert_close(reduced[1][0], both[1][0], atol=2e-6, rtol=0)
    assert [trace.vision_tokens[0] > 0 for trace in run.traces] == [False, False, True]


def _two_in_one_prompt(family, model):
    given = inputs(family, model)
    token = stock.VIDEO if family == "video" else stock.IMAGE
    first, second = (int((row == token).sum()) for row in given["input_ids"])
    return {**given, **ids_of([(3, [(token, first), (token, second)], 6)])}


encodes_first = hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation")
needs_copies = pytest.mark.skipif(not encodes_first, reason="older releases repeat images in the wrong order")


@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=needs_copies)])
@pytest.mark.parametrize(("family", "text"), FAMILIES)
def test_several_images_in_a_prompt_with_and_without_beams(family, text, beams):
    model = stock.stock(family, text)
    given = _two_in_one_prompt(family, model)
    how = {"num_beams": beams, "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    expected = model.generate(**given, **how)
    with KeepAll().on(model):
        assert torch.equal(model.generate(**given, **how), expected)
    with reducer_of("mustdrop").on(model) as run:
        model.generate(**given, **how)
    assert len(run.traces) == 1 and len(run.traces[0].images) == 2


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


@pytest.mark.parametrize(("family", "text"), FAMILIES)
def test_sampling_streaming_and_stopping(family, text):
    model = stock.stock(family, text)
    given = alone(inputs(family, model), 0)

    class After(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.full((len(ids),), ids.shape[1] >= given["input_ids"].shape[1] + 2)

    def sampled():
        torch.manual_seed(3)
        return model.generate(**given, do_sample=True, max_new_tokens=5, min_new_tokens=5)

    class Words:
        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids)) + " "

    expected = sampled()
    reducer = reducer_of("mustdrop")
    with KeepAll().on(model):
        assert torch.equal(sampled(), expected)
    with reducer.on(model):
        stopped = model.generate(**given, max_new_tokens=9, do_sample=False, stopping_criteria=[After()])
        whole = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        streamer = TextIteratorStreamer(Words(), skip_prompt=True)
        how = {**given, "streamer": streamer, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        thread = threading.Thread(target=model.generate, kwargs=how)
        thread.start()
    words = "".join(streamer).split()  # the block has ended, the call goes on as it began
    thread.join()
    length = given["input_ids"].shape[1]
    assert stopped.shape[1] == length + 2
    assert [int(word) for word in words] == whole[0, length:].tolist()
    assert "forward" not in vars(model.model)


@pytest.mark.parametrize(("family", "text"), FAMILIES)
def test_outside_of_the_block_the_model_is_what_it_was(family, text):
    model = stock.stock(family, text)
    given = inputs(family, model)
    logits = model(**given).logits
    before, kind, weights = attributes(model), type(model), {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("mustdrop", "yopo"):
        with reducer_of(name).on(model):
            generate(model, given)
    with pytest.raises(RuntimeError, match="on purpose"), reducer_of("mustdrop").on(model):
        raise RuntimeError("on purpose")
    assert type(model) is kind and attributes(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**given).logits, logits)


def test_a_cache_filled_inside_a_block_is_not_gone_on_with_outside():
    model = stock.stock("llava")
    given = inputs("llava", model)
    with reducer_of("mustdrop").on(model):
        cache = model(**given, use_cache=True)[CACHE_NAME]
        model(input_ids=given["input_ids"][:, -1:], **{CACHE_NAME: cache})
    with pytest.raises(RuntimeError, match="past_key_values: this cache was filled while a reducer was on"):
        model(input_ids=given["input_ids"][:, -1:], **{CACHE_NAME: cache})
    foreign = model(**given, use_cache=True)[CACHE_NAME]
    with (
        pytest.raises(ValueError, match="past_key_values: a (Dynamic)?Cache that holds"),
        reducer_of("fastv").on(model),
    ):
        model(input_ids=given["input_ids"][:, -1:], **{CACHE_NAME: foreign})


@pytest.mark.parametrize(("family", "text"), FAMILIES)
def test_bfloat16(family, text):
    model = copy.deepcopy(stock.stock(family, text)).bfloat16()
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(family, model).items()}
    logits = generate(model, given)[1]
    with KeepAll().on(model):
        assert torch.equal(generate(model, given)[1], logits)
    with reducer_of("mustdrop").on(model):
        assert generate(model, given)[1].dtype == torch.float32 or generate(model, given)[1].isfinite().all()


def test_threads_with_two_reducers_and_one_with_none_on_one_model():
    model = stock.stock("next")
    given = inputs("next", model)
    plain = generate(model, given)[1]
    names = "mustdrop", "divprune", None
    alone_, found, barrier = {None: plain}, {}, threading.Barrier(len(names))
    for name in names[:2]:
        with reducer_of(name).on(model):
            alone_[name] = generate(model, given)[1]

    def work(name):
        barrier.wait()
        with torch.no_grad():
            for _ in range(3):
                if name is None:
                    found.setdefault(name, []).append(generate(model, given)[1])
                else:
                    with reducer_of(name).on(model):
                        found.setdefault(name, []).append(generate(model, given)[1])

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, alone_[name]) for name in names for one in found[name])
    assert len(found) == 3 and "forward" not in vars(model.model)


@pytest.mark.parametrize("spread", ["hooks", "offloaded"])
@pytest.mark.parametrize(("family", "text"), FAMILIES)
def test_models_that_accelerate_has_spread(family, text, spread):
    from accelerate import cpu_offload, dispatch_model

    whole = stock.stock(family, text)
    model = copy.deepcopy(whole)
    given = inputs(family, model)
    if spread == "hooks":
        parts = {"model.language_model.layers.0": "cpu", "": "cpu"}
        model = dispatch_model(model, parts, main_device="cpu", force_hooks=True)
    else:
        model = cpu_offload(model, execution_device="cpu")
    before = attributes(model)
    for name in ("mustdrop", "divprune and fastv", "yopo") if spread == "hooks" else ("divprune and fastv",):
        with reducer_of(name).on(whole):
            expected = whole(**given).logits, generate(whole, given)[1]
        with reducer_of(name).on(model):
            assert torch.equal(model(**given).logits, expected[0])
            if spread == "hooks" or not hasattr(model.model, "image_newline"):  # else stock cannot, either
                assert torch.equal(generate(model, given)[1], expected[1])
    assert attributes(model) == before


def test_hidden_states_attentions_and_labels():
    model = stock.stock("llava")
    given = alone(inputs("llava", model), 0)
    labels = given["input_ids"].masked_fill(given["input_ids"] == stock.IMAGE, -100)
    expected = model(**given, labels=labels, output_hidden_states=True)
    with KeepAll().on(model):
        found = model(**given, labels=labels, output_hidden_states=True)
        assert torch.equal(found.loss, expected.loss)
        assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
        assert torch.equal(model(**given, labels=labels, return_dict=False)[0], expected.loss)
        with pytest.raises(ValueError, match="output_attentions: sdpa attention makes no probabilities"):
            model(**given, output_attentions=True)
    with reducer_of("fastv").on(model):
        found = model(**given, labels=labels)
    own = labels[labels != -100]
    left = found.logits.shape[1]
    assert left < labels.shape[1]
    rows = torch.cat([found.logits[0, :3], found.logits[0, -(len(own) - 3) :]])  # text before the image, and after it
    expected = torch.nn.functional.cross_entropy(
        torch.cat([rows[:2], rows[3:-1]]), torch.cat([own[1:3], own[4:]]), reduction="sum"
    )
    row_before_text = found.logits[0, left - (len(own) - 3) - 1]
    expected += torch.nn.functional.cross_entropy(row_before_text[None], own[3:4], reduction="sum")
    torch.testing.assert_close(found.loss, expected / (len(own) - 1))


def test_sliding_windows_are_refused_where_the_prompt_is_longer():
    model = stock.stock("llava", "sliding")
    short = {**ids_of([(2, [], 3)])}
    with KeepAll().on(model):
        assert generate(model, short)[1].isfinite().all()
        with pytest.raises(ValueError, match="sliding_window: llava's text model sees 40 positions"):
            model(**inputs("llava", model))
        with pytest.raises(ValueError, match="sliding_window"):
            generate(model, short, 60)


def test_what_a_stock_model_cannot_do_is_refused_when_the_block_begins():
    model = stock.stock("llava")
    for method, match in (
        ({"method": "smallimage", "retain": 9}, "method: smallimage makes images smaller"),
        ({"method": "visionzip", "retain": 9, "compat": "official"}, "compat: got 'official', expected 'default'"),
        ({"method": "fastv", "layer": 40, "retain": 9}, "layer"),
        ({"method": "compose", "parts": [{"method": "smallimage"}, {"method": "yopo"}]}, "method: smallimage"),
    ):
        with pytest.raises(ValueError, match=match) as error, load_reducer(method).on(model):
            pass
        assert "\n" not in str(error.value) and "forward" not in vars(model.model)
    several = stock.stock("llava", "llama", vision_feature_layer=(-2, -3))
    with pytest.raises(ValueError, match="vision_feature_layer"), reducer_of("mustdrop").on(several):
        pass
    given = inputs("llava", several)
    logits = several(**given).logits
    with KeepDecoder().on(several):
        valid = given["attention_mask"].bool()
        torch.testing.assert_close(several(**given).logits[valid], logits[valid], atol=2e-6, rtol=0)


class KeepDecoder(Reducer):
    def after_decoder_layer(self, step):
        return None


@pytest.mark.parametrize("argument", [{"cache_implementation": "static"}, {"inputs_embeds": torch.zeros(1, 2, 64)}])
def test_generation_that_a_reducer_cannot_do_is_refused_by_name(argument):
    model = stock.stock("llava")
    given = alone(inputs("llava", model), 0)
    with pytest.raises(ValueError, match=next(iter(argument))), KeepAll().on(model):
        model.generate(**given, **argument, max_new_tokens=2)
    with pytest.raises(ValueError, match="tokens: 36"), KeepAll().on(model):
        model(**{**given, "pixel_values": stock.pixels(2)})


def test_a_cache_that_holds_a_prompt_is_refused_by_generate():
    model = stock.stock("llava")
    given = alone(inputs("llava", model), 0)
    with KeepAll().on(model):
        cache = model(**given, use_cache=True)[CACHE_NAME]
        with pytest.raises(ValueError, match="past_key_values: holds positions already"):
            model.generate(**given, **{CACHE_NAME: cache}, max_new_tokens=2)


@needs_copies
def test_several_sequences_of_a_prompt_and_workers_of_a_pool():
    model = stock.stock("llava")
    given = inputs("llava", model)

    def sampled():
        torch.manual_seed(1)
        return model.generate(**given, do_sample=True, num_return_sequences=3, max_new_tokens=4)

    expected = sampled()
    with KeepAll().on(model):
        assert torch.equal(sampled(), expected)
    how = {**given, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with reducer_of("divprune").on(model) as run:
        expected = model.generate(**how)
        with ThreadPoolExecutor(2) as pool:
            found = [pool.submit(model.generate, **how) for _ in range(3)]
        assert all(torch.equal(one.result(), expected) for one in found)
    assert len(run.traces) == 8


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side):
    model = stock.stock("next")
    given = inputs("next", model)
    rows = [row[mask.bool()] for row, mask in zip(given["input_ids"], given["attention_mask"], strict=True)]
    for name, values in (("input_ids", rows), ("attention_mask", [torch.ones_like(row) for row in rows])):
        given[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_side=side)
    with reducer_of("mustdrop").on(model):
        both = model(**given).logits[:, -1]  # what is left is padded on the left
        single = [model(**alone(given, row)).logits[0, -1] for row in range(2)]
    torch.testing.assert_close(both, torch.stack(single), atol=2e-5, rtol=0)


def test_eager_attention_and_its_probabilities():
    model = copy.deepcopy(stock.stock("next"))
    model.set_attn_implementation("eager")
    given = alone(inputs("next", model), 0)
    expected = model(**given, output_attentions=True)
    with KeepAll().on(model):
        found = model(**given, output_attentions=True)
    assert torch.equal(found.logits, expected.logits)
    assert all(map(torch.equal, found.attentions, expected.attentions))


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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_steps_reach_tower_and_decoder(checkpointing):
    model = copy.deepcopy(stock.stock("next")).train()
    given = inputs("next", model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    with torch.enable_grad(), reducer_of("mustdrop").on(model):
        model(**given, labels=given["input_ids"].masked_fill(given["input_ids"] == stock.IMAGE, -100)).loss.backward()
    parts = model.model.vision_tower.embeddings.patch_embedding, model.model.language_model.layers[0].self_attn.q_proj
    assert all(part.weight.grad.abs().sum() > 0 for part in parts)


def in_peft(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [in_peft, compiled])
def test_wrappers(wrap):
    bare = stock.stock("llava")
    given = inputs("llava", bare)
    plain = bare(**given).logits
    with reducer_of("fastv").on(bare):
        expected = bare(**given).logits
    model = copy.deepcopy(bare)
    wrapped = wrap(model)
    torch.testing.assert_close(wrapped(**given).logits, plain, atol=1e-5, rtol=0)
    assert hooked_model(wrapped) is model
    with reducer_of("fastv").on(wrapped) as run:
        torch.testing.assert_close(wrapped(**given).logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(wrapped(**given).logits, plain, atol=1e-5, rtol=0)
    assert len(run.traces) == 2


def test_a_copy_made_inside_a_block_is_a_model_of_its_own():
    model = stock.stock("llava")
    given = inputs("llava", model)
    logits = model(**given).logits
    with reducer_of("fastv").on(model) as run:
        twin = copy.deepcopy(model)
        for weight in twin.parameters():
            weight.mul_(1.0)
        assert torch.equal(twin(**given).logits, logits) and not run.traces


def test_without_anybody_who_hosts_it_a_stock_model_is_refused_in_one_line():
    code = """
import sys
sys.path.insert(0, "tests")
import mustdrop.hosts as hosts
hosts._installed = lambda: NAMES
import stock
from mustdrop import load_reducer
try:
    with load_reducer({"method": "fastv", "layer": 2, "drop_ratio": 0.5}).on(stock.stock("llava")):
        print("hosted")
except TypeError as error:
    print(error)
"""
    said = {}
    for names in ((), ("llava.model.hosted",)):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("NAMES", repr(names))], capture_output=True, text=True, check=True
        )
        said[len(names)] = done.stdout.strip().splitlines()[-1]
    assert said[0].startswith("LlavaForConditionalGeneration has no hook points") and "import llava" in said[0]
    assert said[1] == "hosted"
