"""What is particular to InternVL: tiles in runs of placeholders, CLS beside units, layers of features, frames."""

import numpy as np
import pytest
import stock
import stock_folders
import torch
from hosted import KeepAll, reducer_of
from PIL import Image
from stock import IMAGE, TILE, TILES, alone, generate, ids_of, inputs
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava.model.builder import load_pretrained_model
from mustdrop import Reducer, load_reducer
from mustdrop.hooks import Keep

UNITS = (TILE // 2) ** 2
TEXTS = ["qwen2", "llama"]  # towers without and with norms of queries and keys


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def unit_order() -> torch.Tensor:
    """CLS and the patches unit by unit, as places among CLS and the patches in raster order."""
    raster = torch.arange(1, 1 + TILE**2).view(TILE // 2, 2, TILE // 2, 2)
    return torch.cat([torch.zeros(1, dtype=torch.long), raster.transpose(1, 2).flatten()])


def own_attention(model, given) -> list[torch.Tensor]:
    """The stock tower's attention, block by block, mean over heads `[tiles, 1 + patches, 1 + patches]`."""
    found, config = [], model.model.vision_tower.config

    def noted(module, query, key, value, attention_mask, scaling, **kwargs):
        weights = (query @ key.transpose(2, 3) * scaling).softmax(-1)
        found.append(weights.mean(1))
        return (weights @ value).transpose(1, 2), weights

    ALL_ATTENTION_FUNCTIONS.register("noted", noted)
    config._attn_implementation = "noted"
    try:
        model(**given)
    finally:
        config._attn_implementation = "sdpa"
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_attention_on_demand_between_cls_and_units_is_the_towers_own(text):
    model = stock.stock("internvl", text)
    given = alone(inputs("internvl", model), 0)
    seen = {}

    class Look(Reducer):
        def after_vision_block(self, step):
            rows = torch.arange(1 + UNITS).expand(TILES[0], -1)
            seen[step.block] = step.attention.mean_over_heads(rows)
            if step.next_attention is not None:
                seen[step.block, "next"] = step.next_attention.mean_over_heads(rows)
            assert step.attention.keys().shape == (TILES[0], 4, 1 + UNITS, 8)

    expected = own_attention(model, given)
    with Look().on(model):
        model(**given)
    order = unit_order()
    for block, own in enumerate(expected):
        own = own[:, order][:, :, order]
        rows = torch.cat([own[:, :1], own[:, 1:].unflatten(1, (UNITS, 4)).mean(2)], 1)
        units = torch.cat([rows[..., :1], rows[..., 1:].unflatten(2, (UNITS, 4)).sum(3)], 2)
        torch.testing.assert_close(seen[block], units, atol=2e-6, rtol=0)
        if block:
            torch.testing.assert_close(seen[block - 1, "next"], units, atol=2e-6, rtol=0)


class Some(Reducer):
    """Drops units after a vision block, or inside of it, and shows what comes out behind the projector."""

    def __init__(self, block: int, mask: torch.Tensor, hook: str = "after_vision_block"):
        self.block, self.mask, self.hook, self.features = block, mask, hook, []

    def after_vision_block(self, step):
        return self._kept(step, "after_vision_block")

    def inside_vision_block(self, step):
        return self._kept(step, "inside_vision_block")

    def _kept(self, step, hook):
        if hook == self.hook and step.block == self.block:
            return Keep.where(self.mask[None].expand_as(step.tokens.patch_index))
        return None

    def on_projected_features(self, step):
        self.features.append(step.tokens.patches)


@pytest.mark.parametrize(
    ("block", "hook"), [(0, "after_vision_block"), (2, "after_vision_block"), (1, "inside_vision_block")]
)
@pytest.mark.parametrize("text", TEXTS)
def test_units_dropped_between_blocks_equal_stock_blocks_on_the_others(text, block, hook):
    model = stock.stock("internvl", text)
    given = alone(inputs("internvl", model), 0)
    mask = torch.rand(UNITS, generator=torch.Generator().manual_seed(1)) < 0.4
    reducer = Some(block, mask, hook)
    with reducer.on(model) as run:
        model(**given)
    assert run.traces == [] or run.traces[0].vision_tokens[0] == int(mask.sum()) * TILES[0]
    inner = model.model
    states = inner.vision_tower.embeddings(given["pixel_values"])
    left = unit_order()[torch.cat([torch.ones(1, dtype=torch.bool), mask.repeat_interleave(4)])]
    for number, layer in enumerate(inner.vision_tower.encoder.layer):
        if number == block and hook == "inside_vision_block":
            states = states + layer.lambda_1 * layer.attention(layer.layernorm_before(states))[0]
            states = states[:, left]
            states = states + layer.lambda_2 * layer.mlp(layer.layernorm_after(states))
        else:
            states = layer(states)
            states = states[:, left] if number == block else states
    units = inner.vision_tower.layernorm(states)[:, 1:].unflatten(1, (-1, 4)).flatten(2)
    expected = inner.multi_modal_projector(units).flatten(0, 1)
    torch.testing.assert_close(reducer.features[0][0], expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("layer", [-2, 1, 4])
def test_features_of_an_earlier_layer(layer):
    model = stock.stock("internvl", "qwen2", vision_feature_layer=layer)
    given = inputs("internvl", model)
    valid = given["attention_mask"].bool()
    logits = model(**given).logits[valid]
    blocks = []

    class Look(KeepAll):
        def after_vision_block(self, step):
            blocks.append((step.block, step.run))

    with Look().on(model):
        torch.testing.assert_close(model(**given).logits[valid], logits, atol=2e-6, rtol=0)
    run = layer % 5
    assert blocks == [(block, run) for block in range(run)]
    with reducer_of("mustdrop" if run > 1 else "uniform").on(model):
        assert generate(model, given)[1].isfinite().all()


def test_features_of_several_layers_are_refused_where_a_method_works_in_the_tower():
    model = stock.stock("internvl", "qwen2", vision_feature_layer=(1, 2))
    said = r"vision_feature_layer: the features are those of \[1, 2\] side by side"
    with pytest.raises(ValueError, match=said), reducer_of("mustdrop").on(model):
        pass
    usual = stock.stock("internvl", "qwen2")
    with pytest.raises(ValueError, match="vision_feature_layer: "), reducer_of("mustdrop").on(usual):
        usual(**inputs("internvl", usual), vision_feature_layer=[1, 2])
    llava = stock.stock("llava")
    with pytest.raises(ValueError, match="vision_feature_layer: "), reducer_of("mustdrop").on(llava):
        llava(**inputs("llava", llava), vision_feature_layer=[1, 2])


def test_an_image_is_a_run_of_tiles():
    model = stock.stock("internvl", "qwen2")
    pixels = stock.pixels(6, side=14 * TILE)
    prompts = [(3, [(IMAGE, 3 * UNITS), (IMAGE, UNITS)], 5), (0, [(IMAGE, 2 * UNITS)], 4)]
    given = {**ids_of(prompts), "pixel_values": pixels}
    with load_reducer({"method": "uniform", "retain": 12}).on(model) as run:
        generate(model, given)
    seen = [[(image["views"], image["patches"], image["tokens"]) for image in trace.images] for trace in run.traces]
    assert seen == [[(3, 3 * UNITS, 12), (1, UNITS, 12)], [(2, 2 * UNITS, 12)]]
    assert run.traces[0].images[0]["patches"] == 3 * UNITS


def test_placeholders_that_do_not_fit_the_tiles_are_refused():
    model = stock.stock("internvl", "qwen2")
    given = {**ids_of([(3, [(IMAGE, UNITS + 1)], 4)]), "pixel_values": stock.pixels(1, side=14 * TILE)}
    with pytest.raises(ValueError, match="do not match"), reducer_of("fastv").on(model):
        model(**given)
    embeds = model.get_input_embeddings()(given["input_ids"][:, :-1])
    with pytest.raises(ValueError, match="inputs_embeds: give input_ids"), reducer_of("fastv").on(model):
        model(inputs_embeds=embeds.index_fill(1, torch.tensor([3]), 0), pixel_values=given["pixel_values"])


def test_frames_of_videos_are_images_of_one_tile(tmp_path, tokenizer_folder):
    folder = stock_folders.save(tmp_path / "internvl", "internvl", "qwen2", tokenizer_folder)
    _, model, processor, _ = load_pretrained_model(folder, device="cpu")
    frames = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (40, 60, 3), dtype="uint8")) for n in range(3)]
    turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "the dog"}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    given = processor(videos=[frames], text=[prompt], return_tensors="pt")
    assert given["pixel_values"].shape == (3, 3, 14 * TILE, 14 * TILE)
    logits = generate(model, given)[1]
    with KeepAll().on(model) as run:
        torch.testing.assert_close(generate(model, given)[1], logits, atol=2e-6, rtol=0)
    assert [image["patches"] for image in run.traces[0].images] == [UNITS] * 3
