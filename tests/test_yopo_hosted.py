"""YOPO on Qwen2-VL and InternVL as its authors ran it there: stock classes with masked attention are the judge."""

import copy
import json
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import stock
import stock_folders
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from stock import IMAGE, LAYERS, alone, generate, ids_of, inputs, patches, typed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import llava  # noqa: F401  (it hosts stock models)
from eval.calibrate import heads as calibrate_heads
from mustdrop import load_reducer, macs
from mustdrop.families import read_shape
from mustdrop.macs import Workload
from mustdrop.methods.yopo import GeneratedHeadAttention

ROWS = [("qwen2", "qwen2"), ("internvl", "qwen2"), ("internvl", "llama"), ("internvl", "phi3")]
MASK = np.random.default_rng(4).random((LAYERS, 4)) < 0.5
MASK[:2], MASK[3] = True, False
FORMS = {"layers": {"layer_cut": 4}, "heads": {"heads": MASK.tolist()}}
FORMS["both"] = FORMS["layers"] | FORMS["heads"]
forms = pytest.mark.parametrize("form", FORMS)
families = pytest.mark.parametrize(("family", "text"), ROWS)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def yopo(form: str):
    return load_reducer({"method": "yopo", "head_scope": "keys", **FORMS[form]})


@contextmanager
def masked(model, given, heads=None, layer_cut=None):
    """The stock model for one prompt, all computed: vision columns taken from heads after the softmax, or before it."""
    vision = given["input_ids"][0] == IMAGE

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        key, value = (states.repeat_interleave(module.num_key_value_groups, 1) for states in (key, value))
        columns = torch.arange(key.shape[2])
        hidden = columns > columns[-query.shape[2] :, None]
        image = torch.cat([vision, vision.new_zeros(len(columns) - len(vision))])
        if layer_cut is not None and module.layer_idx >= layer_cut:
            hidden = (hidden | image) & (columns != columns[-query.shape[2] :, None])
        weights = (query @ key.transpose(2, 3) * scaling).masked_fill(hidden, -torch.inf).softmax(-1)
        if heads is not None:
            weights[:, ~torch.tensor(heads[module.layer_idx])] *= ~image
        return (weights @ value).transpose(1, 2), weights

    ALL_ATTENTION_FUNCTIONS.register("masked", attend)
    config = model.model.language_model.config
    config._attn_implementation = "masked"
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def two_images(model) -> dict:
    """A prompt of two images of different size."""
    grids = [[1, 12, 16], [1, 4, 8]]
    runs = [(IMAGE, rows * columns // 4) for _, rows, columns in grids]
    given = typed("qwen2", ids_of([(4, runs, 6)]))
    return {**given, "pixel_values": patches(grids), "image_grid_thw": torch.tensor(grids)}


@forms
@families
def test_equals_masks_on_the_stock_model(family, text, form):
    model = stock.stock(family, text)
    given = alone(inputs(family, model), 0)
    plain = generate(model, given)[1]
    with masked(model, given, **FORMS[form]):
        expected = generate(model, given)
    with yopo(form).on(model) as run:
        found = generate(model, given)
    assert (expected[1] - plain).abs().max() > 0.01
    torch.testing.assert_close(found[1], expected[1], atol=2e-5, rtol=0)
    assert torch.equal(found[0], expected[0])
    vision, (trace,) = int((given["input_ids"] == IMAGE).sum()), run.traces
    assert trace.vision_tokens == [vision] * 4 + [0 if "layer_cut" in FORMS[form] else vision] * 2


@forms
def test_several_images(form):
    model = stock.stock("qwen2", "qwen2")
    given = two_images(model)
    with masked(model, given, **FORMS[form]):
        expected = generate(model, given)
    with yopo(form).on(model):
        found = generate(model, given)
    torch.testing.assert_close(found[1], expected[1], atol=2e-5, rtol=0)


@forms
@families
def test_a_batch_is_what_its_prompts_are_alone(family, text, form):
    model = stock.stock(family, text)
    given = inputs(family, model)
    with yopo(form).on(model) as run:
        together = generate(model, given)[1]
        singles = [generate(model, alone(given, row))[1] for row in range(2)]
    torch.testing.assert_close(together, torch.cat(singles), atol=2e-5, rtol=0)
    facts = [{**trace.to_dict(), "times_ms": None} for trace in run.traces]
    assert facts[:2] == facts[2:]


@families
def test_text_alone_is_the_stock_models(family, text):
    model = stock.stock(family, text)
    given = typed(family, ids_of([(9, [], 3)]))
    expected = generate(model, given)[1]
    with yopo("both").on(model):
        assert torch.equal(generate(model, given)[1], expected)


@forms
@families
def test_costs_are_what_torch_counts(family, text, form, tmp_path):
    model = stock.stock(family, text)
    given = alone(inputs(family, model), 0)
    counted = {}
    for name, around in (("stock", nullcontext()), (form, yopo(form).on(model))):
        with around as run, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**given, use_cache=True, logits_to_keep=1)
        counted[name] = counter.get_total_flops()
    model.config.save_pretrained(tmp_path)
    size = (224, 168) if family == "qwen2" else None  # of its processor, for the first image
    shape = read_shape(str(tmp_path), pixels=size, is_path=True)
    work = Workload.of_trace(shape, json.loads(json.dumps(run.traces[0].to_dict())))
    parts = macs.costs(shape, work)
    assert 2 * sum(parts[name] for name in ("vision_tower", "projector", "prefill")) == counted[form]
    assert counted[form] < counted["stock"]


# Calibration


@families
def test_the_first_generated_row_is_measured_as_eager_attention_says(family, text):
    model = copy.deepcopy(stock.stock(family, text))
    given, heads = inputs(family, model), GeneratedHeadAttention()
    plain = generate(model, given)[1]
    with heads.on(model):
        assert torch.equal(generate(model, given)[1], plain)
    model.set_attn_implementation("eager")
    assert len(heads.ratios) == 2
    for row, found in enumerate(heads.ratios):
        one = alone(given, row)
        more = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
        paid = torch.stack(
            [layer[0, :, 0] for layer in model.generate(**one, **more, output_attentions=True).attentions[1]]
        )
        vision = torch.cat([one["input_ids"][0] == IMAGE, torch.tensor([False])])
        expected = paid[..., vision].sum(-1) / paid[..., ~vision].sum(-1)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "text", "recipe"), [("qwen2", "qwen2", "qwen2-vl-7b"), ("internvl", "phi3", "internvl2-4b")]
)
def test_the_command_follows_the_authors_on_a_stock_checkpoint(
    family, text, recipe, tmp_path, monkeypatch, tokenizer_folder
):
    monkeypatch.chdir(tmp_path)
    folder = stock_folders.save(tmp_path / "model", family, text, tokenizer_folder)
    entries = [{"image": f"{number}.png", "question": f"the dog {number}"} for number in range(3)]
    for number, entry in enumerate(entries):
        Image.new("RGB", (150, 100 + 50 * number), "red").save(entry["image"])
    Path("data.json").write_text(json.dumps(entries))
    arguments = ["--model", str(folder), "--data", "data.json", "--device", "cpu"]
    assert calibrate_heads.main([*arguments, "--recipe", recipe, "--out", "heads.npy"]) == 0
    facts = json.loads(Path("heads.json").read_text())
    assert (facts["samples"], facts["rows"], facts["recipe"]) == (1, "generated", recipe)
    assert facts["threshold"] == {"qwen2-vl-7b": 0.07, "internvl2-4b": 0.08}[recipe]
    assert calibrate_heads.main([*arguments, "--share", "0.5", "--rows", "generated", "--out", "half.npy"]) == 0
    facts = json.loads(Path("half.json").read_text())
    assert (facts["samples"], facts["rows"], facts["mean_active"]) == (3, "generated", 2.0)
    mask = np.load("half.npy").tolist()
    assert load_reducer({"method": "yopo", "heads": mask, "head_scope": "keys"}).plan(0, LAYERS) is None
    assert calibrate_heads.main([*arguments, "--share", "0.5", "--full-layers", "7", "--out", "all.npy"]) == 2
    assert not Path("all.npy").exists()


def golden_model(weights: dict):
    """The tiny model of the authors' file under today's names."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {**stock.TEXT, "num_hidden_layers": 28, "rope_parameters": rope}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    config = hf.Qwen2VLConfig(text_config=text, vision_config=vision, **stock.QWEN_IDS)
    model = hf.Qwen2VLForConditionalGeneration(config).eval()
    inner = {"model.": "model.language_model.", "visual.": "model.visual.", "lm_head.": "lm_head."}
    renamed = {
        new + name.removeprefix(old): value
        for name, value in weights.items()
        for old, new in inner.items()
        if name.startswith(old)
    }
    model.load_state_dict(renamed)
    return model


def test_equals_the_authors_on_qwen2_vl(golden):
    facts = load_file(golden / "models" / "yopo_qwen2vl.safetensors")
    model = golden_model({name[8:]: value for name, value in facts.items() if name.startswith("weights.")})
    ids, mask = facts["ids"], facts["mask"].clone()
    mask[:2] = True  # the authors' code reads the mask from layer 2 on
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).int()}
    given |= {"pixel_values": facts["pix"], "image_grid_thw": facts["thw"]}
    cut, heads = {"layer_cut": 24}, {"heads": mask.tolist(), "head_scope": "keys"}
    for name, fields in {"plain": {}, "layers": cut, "heads": heads, "both": {**cut, **heads}}.items():
        with load_reducer({"method": "yopo", **fields}).on(model):
            found, logits = generate(model, given)
        torch.testing.assert_close(logits, facts[name], atol=2e-6, rtol=0)
        assert torch.equal(found[:, -4:], facts[f"{name}_ids"])
