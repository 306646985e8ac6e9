"""Images reduced for engines that must know the number of tokens: settings, counts, positions; no engine is needed."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import stock
import tiles
import tiny
import torch
from transformers import CLIPVisionConfig

from llava.constants import IMAGE_TOKEN_INDEX
from llava.serve import vllm_plugin
from llava.serve.exact import Counter, ImageEncoder, VisionSizes, read_settings
from llava.serve.positions import Room, as_columns, as_told, behind, in_full
from mustdrop import available_methods, load_reducer

SMALL = {
    "tome": {"retain": 40},
    "mustdrop_plus": {"retain": 30},
    "evs": {},
    "visionzip": {"retain": 12},
    "prumerge": {"retain": 12},
}
IN_DECODER = {"dart", "fastv", "mustdrop", "pyramiddrop", "sparsevlm", "tops", "vscan", "yopo"}
BY_QUESTION = {"cdpruner"}
BOTH = {"trevs"}  # in the decoder, and by the question
SERVED = sorted(set(available_methods()) - IN_DECODER - BY_QUESTION - BOTH)


def settings_of(name: str) -> dict:
    return {
        "method": name,
        **SMALL.get(name, {"retain": 12} if hasattr(load_reducer({"method": name}), "retain") else {}),
    }


def sizes_of(model, pinpoints=None) -> VisionSizes:
    config = model.config
    vision = CLIPVisionConfig(**config.mm_vision_config)
    return VisionSizes(vision, -2, config.num_hidden_layers, config.num_attention_heads, pinpoints)


def encoder_of(model, sizes: VisionSizes, settings) -> ImageEncoder:
    """The encoder on the weights of one of our own models."""
    inner, tower = model.get_model(), sizes.new_tower()
    tower.load_state_dict(model.get_vision_tower().state_dict())
    newline = getattr(inner, "image_newline", None)
    return ImageEncoder(sizes, settings, tower, inner.mm_projector, model.config.hidden_size, newline)


@pytest.mark.parametrize("name", SERVED)
def test_an_image_takes_the_tokens_that_were_counted_and_they_are_our_own(name):
    model = tiny.ours()
    sizes, settings = sizes_of(model), read_settings(settings_of(name))
    room = Counter(sizes, settings).of()
    pixels = tiny.pictures(3)
    found = encoder_of(model, sizes, settings).images([image[None] for image in pixels])
    assert {len(states) for states, _ in found} == {room.tokens}
    ids = torch.tensor([[5, IMAGE_TOKEN_INDEX, 7, 8]])
    for image, (states, position) in zip(pixels, found, strict=True):
        with settings.reducer.on(model):
            prompt = model.splice(ids, images=[image])
        assert torch.allclose(prompt.embeds[0, 1 : 1 + room.tokens], states, atol=1e-5)
        assert torch.equal(prompt.tokens.position[0, 1 : 1 + room.tokens], position + 1)
        assert int(prompt.tokens.position[0, -2]) == 1 + room.span


@pytest.mark.parametrize("name", sorted(set(available_methods()) - set(SERVED)))
def test_what_an_engine_cannot_do_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=rf"method is '{name}'") as error:
        read_settings({"method": name})
    text = str(error.value)
    assert "\n" not in text and ("decoder" in text or "question" in text)


def test_every_method_is_served_or_refused():
    refused = {name for name in available_methods() if _is_refused(name)}
    assert refused == IN_DECODER | BY_QUESTION | BOTH


def _is_refused(name: str) -> bool:
    try:
        read_settings({"method": name})
    except ValueError:
        return True
    return False


WRONG = {
    "no mapping": ("divprune", "mustdrop: got 'divprune'"),
    "unknown method": ({"method": "divprun"}, "did you mean divprune"),
    "unknown field": ({"method": "divprune", "retan": 64}, "did you mean retain"),
    "no method": ({"retain": 64}, "method is None"),
    "type": ({"method": "divprune", "retain": "64"}, "retain is '64'"),
    "positions": ({"method": "divprune", "positions": "kept"}, "positions is 'kept'"),
    "thresholds": ({"method": "mustdrop", "stages": ["vision"]}, "depends on the image"),
    "adaptive": ({"method": "prumerge"}, "depends on the image"),
    "cache": ({"method": "mustdrop", "stages": ["decode"]}, "works inside the decoder"),
    "composed": ({"method": "compose", "parts": [{"method": "divprune"}, {"method": "fastv"}]}, "inside the decoder"),
    "out of reach": ({"method": "tome", "retain": 3}, "retain is 3"),
    "not a count": ({"method": "mustdrop", "stages": ["vision"], "merge_to": 100, "window": 3}, "merge_to is 100"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_one_line(name):
    settings, line = WRONG[name]
    with pytest.raises(ValueError, match=line) as error:
        Counter(sizes_of(tiny.ours()), read_settings(settings))
    assert "\n" not in str(error.value)


def test_mustdrop_plus_says_what_is_left_out():
    settings = read_settings({"method": "mustdrop_plus", "retain": 30})
    assert settings.left_out == ("DualAttentionFilter", "OutputAwareCache")
    assert Counter(sizes_of(tiny.ours()), settings).of() == Room(60, 144)
    whole = read_settings({"method": "mustdrop", "stages": ["vision"], "merge_to": 80})
    assert whole.left_out == () and Counter(sizes_of(tiny.ours()), whole).of().tokens == 80


@pytest.mark.parametrize("name", ["vanilla", "divprune", "holov", "mustdrop_plus"])
def test_tiled_images_take_what_was_counted_and_keep_all_newlines(name):
    model = tiles.native()
    pinpoints = tuple((width, height) for width, height in tiles.GRIDS)
    sizes = sizes_of(model, pinpoints)
    settings = read_settings({"method": name, **({"retain": 9} if name != "vanilla" else {})})
    counter, encoder = Counter(sizes, settings), encoder_of(model, sizes, settings)
    shapes = list(tiles.SIZES.values())
    stacks = tiles.stacks(shapes)
    found = encoder.images(stacks, shapes)
    assert [len(states) for states, _ in found] == [counter.of(shape).tokens for shape in shapes]
    full = Counter(sizes, read_settings({"method": "vanilla"}))
    for shape, stack, (states, position) in zip(shapes, stacks, found, strict=True):
        ((plain, places),) = encoder_of(model, sizes, read_settings({"method": "vanilla"})).images([stack], [shape])
        assert len(plain) == full.of(shape).span == counter.of(shape).span and torch.equal(
            places, torch.arange(len(plain))
        )
        newlines = (states == model.get_model().image_newline).all(-1)
        assert int(newlines.sum()) == int((plain == model.get_model().image_newline).all(-1).sum())
        if name in ("divprune", "holov"):
            assert torch.allclose(states, plain[position], atol=1e-6)


def test_borders_that_may_hide_tokens_are_refused_for_that_image_alone():
    sizes = sizes_of(tiles.native(), tuple(map(tuple, tiles.GRIDS)))
    counter = Counter(sizes, read_settings({"method": "uniform", "retain": 9}))
    whole = (2 * stock.PIXELS, 2 * stock.PIXELS)
    assert counter.of(whole).tokens == 9 + 2 * stock.SIDE
    with pytest.raises(ValueError, match="image of 250 x 60 pixels: uniform leaves 9 tokens"):
        counter.of((250, 60))
    assert counter.of(whole).tokens == 9 + 2 * stock.SIDE


def test_positions_are_those_of_the_full_prompt():
    rooms = [(2, 3, Room(3, 9)), (5, 3, Room(3, 9)), (10, 3, Room(3, 9))]  # two side by side
    rows, delta = in_full(14, rooms)
    assert rows[0].tolist() == [0, 1, 3, 6, 9, 12, 15, 18, 20, 21, 23, 26, 29, 31]
    assert rows[1].tolist() == [0, 1, 2, 2, 2, 11, 11, 11, 20, 21, 22, 22, 22, 31]
    assert delta == behind(rows) == 32 - 14
    assert in_full(3, [])[0][0].tolist() == [0, 1, 2] and in_full(3, [])[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_positions_travel_in_any_type_and_in_any_pieces(dtype):
    rooms = [(1, 4, Room(4, 3000)), (5, 4, Room(4, 3000))]
    kept = torch.tensor([0, 257, 2049, 2999])
    rows, delta = in_full(10, rooms)
    shown = torch.tensor([False, *[True] * 8, False])
    told = as_columns(kept).to(dtype)
    whole, _ = as_told(rows, shown, 0, torch.cat([told, told]))
    assert whole[0].tolist() == [0, *(1 + kept).tolist(), *(3001 + kept).tolist(), 6001]
    pieces, after = as_told(rows, shown, 0, told[:3])
    pieces, after = as_told(pieces, shown, 4, torch.cat([told[3:], told[:1]]))
    pieces, after = as_told(pieces, shown, 6, told[1:])
    again, after = as_told(pieces, shown, 0, torch.cat([told, told]))  # after a preemption everything comes anew
    assert torch.equal(pieces, whole) and torch.equal(again, whole) and after == delta


def config(**changes):
    text = SimpleNamespace(
        num_hidden_layers=8, num_attention_heads=2, hidden_size=32, head_dim=None, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default"},
    )  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=4, image_size=168, patch_size=14)
    facts = {
        "vision_config": vision,
        "text_config": text,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "mustdrop": {"method": "divprune", "retain": 12},
    }
    return SimpleNamespace(**{**facts, **changes})


def prepared(**changes):
    model = SimpleNamespace(hf_config=config(**changes), multimodal_config=SimpleNamespace(video_pruning_rate=None))
    vllm_plugin.prepare(model)
    return model


@pytest.mark.parametrize(
    ("positions", "asks", "rows"), [("original", True, True), ("spread", False, True), ("renumber", False, False)]
)
def test_the_engine_is_told_of_positions(positions, asks, rows):
    model = prepared(mustdrop={"method": "divprune", "retain": 12, "positions": positions})
    assert bool(model.multimodal_config.video_pruning_rate) == asks
    assert getattr(model.hf_config, "mrope_section", None) == ([8, 0, 0] if rows else None)
    assert model.hf_config.text_config.max_position_embeddings == (8192 if rows else 4096)


def test_the_log_says_what_is_kept_and_what_is_left_out(caplog):
    prepared(mustdrop={"method": "mustdrop_plus", "retain": 30})
    assert "mustdrop_plus leaves 60 tokens" in caplog.text and "OutputAwareCache" in caplog.text


def test_models_of_other_forms_are_refused():
    with pytest.raises(ValueError, match="vision_feature_layer is \\[-2, -1\\]"):
        prepared(vision_feature_layer=[-2, -1])
    with pytest.raises(ValueError, match="vision_feature_select_strategy is 'full'"):
        prepared(vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="vision_config.model_type is 'pixtral'"):
        prepared(vision_config=SimpleNamespace(model_type="pixtral"))
    text = config().text_config
    text.rope_parameters = {"rope_type": "yarn"}
    with pytest.raises(ValueError, match="it must be 'renumber' for a model whose rope_type is 'yarn'"):
        prepared(text_config=text)


def test_counting_touches_neither_default_type_nor_random_numbers():
    sizes = sizes_of(tiny.ours())
    torch.manual_seed(3)
    before = torch.rand(1)
    torch.manual_seed(3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        Counter(sizes, read_settings({"method": "random", "retain": 12})).of()
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(1), before)


def test_the_plugin_costs_nothing_until_it_is_asked():
    code = "import sys, llava.serve.vllm_plugin; sys.exit(any(name in sys.modules for name in ('torch', 'vllm')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
