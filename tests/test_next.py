"""LLaVA-NeXT in LLaVA's own format against transformers' `LlavaNextForConditionalGeneration` on the same weights."""

from contextlib import nullcontext

import pytest
import stock
import tiles
import torch
from hosted import METHODS, reducer_of
from tiles import SIZES, for_stock, native, prompts, stacks

from mustdrop import Reducer


def generated(model, given, **images):
    inputs = {"inputs": given["input_ids"], "attention_mask": given["attention_mask"]}
    output = model.generate(
        **inputs,
        **images,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences, torch.stack(output.logits, dim=1)


def both(given, sizes, text="llama", method=None, **changes):
    """What the stock model and ours make of the same prompts, plain or under a method; and the traces."""
    pixels, found, traces = stacks(sizes), [], []
    theirs = for_stock(text, given, sizes, pixels)
    for model, run in (
        (stock.stock("next", text), lambda model: stock.generate(model, theirs)),
        (native(text, **changes), lambda model: generated(model, given, images=pixels or None, image_sizes=sizes)),
    ):
        with nullcontext() if method is None else method.on(model) as record:
            found.append(run(model))
        traces.append([] if record is None else record.traces)
    new = found[1][0].shape[1]
    return (found[0][0][:, -new:], found[0][1]), found[1], traces


def assert_equal(theirs, ours, atol=1e-5):
    assert theirs[0].tolist() == ours[0].tolist()
    torch.testing.assert_close(ours[1], theirs[1], atol=atol, rtol=0)


@pytest.mark.parametrize("text", ["llama", "mistral", "sliding"])
@pytest.mark.parametrize("shape", SIZES)
def test_an_image_of_any_shape_is_read_as_transformers_does(shape, text):
    sizes = [SIZES[shape]]
    given = prompts([(3, 1, 6)])
    theirs, ours, _ = both(given, sizes, text)
    assert_equal(theirs, ours)


@pytest.mark.parametrize("texts", [[(3, 1, 6), (2, 2, 4), (5, 0, 3)], [(2, 3, 2)], [(4, 0, 3)]])
def test_batches_several_images_and_text_alone(texts):
    sizes = list(SIZES.values())[: sum(images for _, images, _ in texts)]
    theirs, ours, _ = both(prompts(texts), sizes)
    assert_equal(theirs, ours)
    *_, traces = both(prompts(texts), sizes, method=Reducer())
    views = iter(map(tiles.views, sizes))
    for trace, (_, images, _) in zip(traces[1], texts, strict=True):
        assert [image["views"] for image in trace.images] == [next(views) for _ in range(images)]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_does_with_tiles_what_it_does_on_the_stock_class(name):
    """Our own tower, projector and prompt against the hosted model: answers, and all that traces say."""
    sizes = [SIZES["square"], SIZES["wide"], SIZES["cut"]]
    method = reducer_of(name)
    if method.tile_order == "flat":
        pytest.skip("the authors' order of tiles: see test_golden_next")
    theirs, ours, traces = both(prompts([(3, 1, 6), (2, 2, 4)]), sizes, method=method)
    assert_equal(theirs, ours)
    for mine, stocks in zip(traces[1], traces[0], strict=True):
        assert mine.to_dict() | {"times_ms": 0} == stocks.to_dict() | {"times_ms": 0}
