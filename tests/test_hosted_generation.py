"""What `generate` and caches do on hosted models: beams, streams, samples, padding, refusals."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import stock
import torch
from hosted import FAMILIES, KeepAll, reducer_of
from stock import alone, ids_of, inputs
from transformers import GenerationConfig, GenerationMixin, StoppingCriteria, TextIteratorStreamer

import llava  # noqa: F401  (it hosts stock models)
from llava.model.language_model.cache import CACHE_NAME


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def _two_in_one_prompt(family, model):
    given = inputs(family, model)
    token = stock.VIDEO if family == "video" else stock.IMAGE
    first, second = (int((row == token).sum()) for row in given["input_ids"])
    return {**given, **stock.typed(family, ids_of([(3, [(token, first), (token, second)], 6)]))}


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


@pytest.mark.parametrize("argument", [{"cache_implementation": "static"}, {"inputs_embeds": torch.zeros(1, 2, 64)}])
def test_generation_that_a_reducer_cannot_do_is_refused_by_name(argument):
    model = stock.stock("llava")
    given = alone(inputs("llava", model), 0)
    with pytest.raises(ValueError, match=next(iter(argument))), KeepAll().on(model):
        model.generate(**given, **argument, max_new_tokens=2)
    with pytest.raises(ValueError, match="tokens: 36"), KeepAll().on(model):
        model(**{**given, "pixel_values": stock.pixels(2)})


def test_settings_of_generation_by_place():
    model = stock.stock("llava")
    given = alone(inputs("llava", model), 0)
    settings = GenerationConfig(max_new_tokens=3, min_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0)
    ids = given.pop("input_ids")
    expected = model.generate(ids, settings, **given)
    with KeepAll().on(model):
        assert torch.equal(model.generate(ids, settings, **given), expected)
        settings.guidance_scale = 2.0
        with pytest.raises(ValueError, match="guidance_scale"):
            model.generate(ids, settings, **given)


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
@pytest.mark.parametrize("family", ["next", "qwen2.5", "internvl"])
def test_padding_on_either_side(family, side):
    model = stock.stock(family)
    given = inputs(family, model)
    rows = [row[mask.bool()] for row, mask in zip(given["input_ids"], given["attention_mask"], strict=True)]
    for name, values in (("input_ids", rows), ("attention_mask", [torch.ones_like(row) for row in rows])):
        given[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_side=side)
    given = stock.typed(family, given)
    with reducer_of("mustdrop").on(model):
        both = model(**given).logits[:, -1]  # what is left is padded on the left
        single = [model(**alone(given, row)).logits[0, -1] for row in range(2)]
    torch.testing.assert_close(both, torch.stack(single), atol=2e-5, rtol=0)
