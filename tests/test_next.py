"""LLaVA-NeXT in LLaVA's own format against transformers' `LlavaNextForConditionalGeneration` on the same weights."""

from contextlib import nullcontext

import pytest
import stock
import tiles
import torch
from hosted import METHODS, reducer_of
from PIL import Image
from tiles import SIZES, for_stock, native, prompts, stacks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.mm_utils import process_images
from llava.model import LlavaLlamaForCausalLM
from mustdrop import Reducer, load_reducer
from mustdrop.macs import Workload, costs
from mustdrop.shape import ModelShape


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
    theirs = for_stock(stock.stock("next", text), given, sizes, pixels)
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


COUNTED = [("next", "llama", {}), ("next", "llama", {"mm_patch_merge_type": "flat"}), ("next", "mistral", {})]


@pytest.mark.parametrize(("kind", "text", "changes"), [*COUNTED, ("onevision", "qwen2", {"most": 1})])
@pytest.mark.parametrize("shape", ["square", "wide", "cut"])
def test_costs_are_what_torch_counts(kind, text, changes, shape):
    """Of our own model, and of OneVision where tiles are blended, from the size of an image alone and from a trace."""
    size, given = SIZES[shape], prompts([(3, 1, 6)])
    pixels = stacks([size])
    if kind == "onevision":
        model = stock.stock(kind, text, vision_aspect_ratio="anyres_max_1", attn_implementation="eager")
        theirs = for_stock(model, given, [size], pixels)
        config, run = model.config, lambda: model.generate(**theirs, max_new_tokens=1)
    else:
        model = native(text, **changes)
        ids = given["input_ids"]
        config, run = model.config, lambda: model.generate(ids, pixels, [size], max_new_tokens=1)
    costs_of = ModelShape.from_config(config.to_dict())
    with Reducer().on(model) as record, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    image = costs_of.image(size)
    text_tokens = given["input_ids"].shape[1] - 1 + image.newlines
    from_size = costs(costs_of, Workload.of(costs_of, text_tokens=text_tokens, images=[image]))
    work = Workload.of_trace(costs_of, record.traces[0].to_dict())
    from_trace = costs(costs_of, work)
    counted = 2 * sum(from_size[part] for part in ("vision_tower", "projector", "prefill"))
    assert counted == counter.get_total_flops()
    assert {**from_trace, "selector": 0} == {**from_size, "selector": 0}
    assert costs(costs_of, work.unreduced(costs_of))["prefill"] == from_size["prefill"]


@torch.no_grad()
def test_the_flat_protocol_is_two_by_two_tiles_whatever_the_shape(tmp_path):
    model = native(protocol="flat")
    size, patches = SIZES["strip"], 5 * tiles.SIDE**2
    side = {"height": tiles.PIXELS, "width": tiles.PIXELS}
    processor = CLIPImageProcessorPil(size={"shortest_edge": tiles.PIXELS}, crop_size=side)
    pixels = process_images([Image.new("RGB", size, (9, 99, 200))], processor, model.config)
    assert len(pixels[0]) == 5
    spliced = model.splice(prompts([(3, 1, 4)])["input_ids"], images=pixels, image_sizes=[size])
    assert (
        spliced.tokens.prompts[0].images[0].patches
        == patches
        == ModelShape.from_config(model.config.to_dict()).vision_tokens
    )
    assert spliced.embeds.shape[1] == prompts([(3, 1, 4)])["input_ids"].shape[1] - 1 + patches
    for change, line in (
        ({"protocol": "flatter"}, "protocol is 'flatter'"),
        ({"protocol": "flat", "image_aspect_ratio": "pad"}, "protocol is 'flat'"),
    ):
        with pytest.raises(ValueError, match=line):
            LlavaLlamaForCausalLM.from_pretrained(tiles.save(tmp_path / line, **change))


def test_sizes_that_do_not_fit_the_tiles_are_named():
    model, given = native(), prompts([(3, 1, 4)])["input_ids"]
    pixels = stacks([SIZES["wide"]])
    for sizes, line in (
        (None, "image_sizes: left out"),
        ([(70, 160)] * 2, "of each of 1 images"),
        ([(160, 150)], "views"),
    ):
        with pytest.raises(ValueError, match=line) as error:
            model.splice(given, images=pixels, image_sizes=sizes)
        assert "\n" not in str(error.value)


VISIONZIP = {"method": "visionzip", "dominant": 4, "contextual": 2, "compat": "official"}
ORDERING = [VISIONZIP, {"method": "compose", "parts": [VISIONZIP, {"method": "fastv", "layer": 2, "drop_ratio": 0.5}]}]


@pytest.mark.parametrize("settings", ORDERING)
@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_a_method_that_orders_tiles_needs_their_sizes(merge, settings):
    """VisionZip as published lays tiles out by the image's shape; without it, it would leave them as they come."""
    model, given = native(mm_patch_merge_type=merge), prompts([(3, 1, 4)])["input_ids"]
    with load_reducer(settings).on(model):
        with pytest.raises(ValueError, match="image_sizes: left out"):
            model(given, images=stacks([SIZES["wide"]]))
        model(given, images=stacks([SIZES["wide"]]), image_sizes=[SIZES["wide"]])
        model(given, images=[stacks([SIZES["wide"]])[0][:1]])  # an overview alone has no order


@pytest.mark.parametrize("name", METHODS)
def test_where_nothing_is_stitched_a_method_answers_without_sizes_as_with_them(name):
    """Where nothing is stitched, only methods that order tiles read the sizes, and those say so."""
    model, given = native(protocol="flat"), prompts([(3, 1, 4)])["input_ids"]
    pixels, sizes = [stock.pixels(5)], [(160, 150)]
    method = reducer_of(name)
    with method.on(model):
        expected = model(given, images=pixels, image_sizes=sizes).logits
        assert method.needs_tiles or torch.equal(model(given, images=pixels).logits, expected)
