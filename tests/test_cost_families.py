"""Costs of Qwen-VL and InternVL against torch's own counter on tiny random models, and against YOPO's figures."""

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import internvl2
import pytest
import torch
import transformers as hf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mustdrop import cost, macs
from mustdrop.families import NAMED, read_shape
from mustdrop.macs import Workload
from mustdrop.shape import ModelShape

TEXT = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
TOWER = {"depth": 4, "num_heads": 4, "patch_size": 14}
ROWS, COLUMNS = 20, 12  # patches: windows of 8 x 8, the last ones of 4


def qwen2():
    vision = {**TOWER, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return hf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision)


def qwen2_5():
    vision = {**TOWER, "hidden_size": 32, "intermediate_size": 56, "out_hidden_size": 64}
    vision |= {"window_size": 112, "fullatt_block_indexes": [1, 3]}
    return hf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision)


def qwen3():
    vision = {**TOWER, "hidden_size": 32, "intermediate_size": 56, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [1, 2], "num_position_embeddings": 64}
    text = {**TEXT, "head_dim": 24, "rope_parameters": {**ROPE, "mrope_section": [4, 4, 4], "mrope_interleaved": True}}
    return hf.Qwen3VLConfig(text_config=text, vision_config=vision)


def internvl(text: str = "llama"):
    vision = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 14,
        "image_size": 56,
    }
    return hf.InternVLConfig(vision_config=vision, text_config={"model_type": text, "pad_token_id": 0, **TEXT})


CONFIGS = {
    "qwen2_vl": qwen2,
    "qwen2_5_vl": qwen2_5,
    "qwen3_vl": qwen3,
    "internvl": internvl,
    "internvl-phi3": lambda: internvl("phi3"),
}


@pytest.fixture(params=CONFIGS)
def family(request, tmp_path):
    """A tiny random model, its pixels, and its shape as read from its config.json."""
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(CONFIGS[request.param](), attn_implementation="sdpa").eval()
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    patch = getattr(model.config.vision_config, "patch_size", 14)
    if request.param.startswith("internvl"):
        return model, {"pixel_values": torch.randn(1, 3, 56, 56)}, read_shape(str(tmp_path), is_path=True)
    pixels = {
        "pixel_values": torch.randn(ROWS * COLUMNS, 3 * 2 * patch**2),
        "image_grid_thw": torch.tensor([[1, ROWS, COLUMNS]]),
    }
    return model, pixels, read_shape(str(tmp_path), pixels=(COLUMNS * patch, ROWS * patch), is_path=True)


@contextlib.contextmanager
def counted_macs():
    """Yields a namespace whose `macs` is filled in at the end."""
    counter, result = FlopCounterMode(display=False), SimpleNamespace()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        yield result
    result.macs = counter.get_total_flops() // 2


# Against torch's counter


def test_tower_and_projector_are_what_torch_counts(family):
    model, pixels, shape = family
    tokens = shape.vision_tokens
    with counted_macs() as counted:
        model.get_image_features(**pixels)
    wanted = macs.vision_macs(shape, [tokens] * shape.vision_layers) + macs.projector_macs(shape, tokens)
    assert counted.macs == wanted


def test_prefill_is_what_torch_counts(family):
    model, _, shape = family
    embeds = torch.randn(1, 30 + 7, 64)
    text = model.model.language_model
    positions = torch.arange(37)[None] if model.config.model_type == "internvl" else torch.arange(37).expand(3, 1, 37)
    with counted_macs() as counted:
        hidden = text(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
        model.lm_head(hidden[:, -1:])
    rotary = counted.macs - macs.prefill_macs(shape, [30] * 4, 7)
    assert rotary == 0


def test_windows_are_cut_where_tokens_are_dropped():
    shape = replace(read_shape("qwen2.5-vl-7b"), grid=(20, 12))
    assert macs.tower_pairs(shape, 7, 60) == 240**2
    assert macs.tower_pairs(shape, 0, 60) == 2 * 64**2 + 3 * 32**2 + 16**2  # 4, 4, 2 by 4, 2 tokens of 4 patches
    assert macs.tower_pairs(shape, 0, 30) == macs.tower_pairs(shape, 0, 60) // 4


def test_tokens_of_a_tower_are_units(family):
    _, _, shape = family
    work = Workload.of(shape, 3, text_tokens=7)
    assert work.image_tokens == (shape.vision_tokens,) and shape.patches == 4 * shape.vision_tokens
    halved = Workload.of(shape, text_tokens=7, image_tokens=[shape.vision_tokens // 2])
    assert macs.costs(shape, halved)["vision_tower"] < macs.costs(shape, work)["vision_tower"]
    merged = macs.vision_macs(shape, [shape.vision_tokens, *[shape.vision_tokens // 2] * (shape.vision_layers - 1)])
    assert macs.costs(shape, halved)["vision_tower"] == merged


def test_an_original_internvl2_has_the_shape_of_its_translation(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(internvl2.config()))
    original = read_shape(str(tmp_path), is_path=True)
    from llava.model.convert.internvl_config import translated

    translated(internvl2.config()).save_pretrained(tmp_path / "new")
    stock = read_shape(str(tmp_path / "new"), is_path=True)
    assert replace(original, name="", projector_type="") == replace(stock, name="", projector_type="")
    assert (original.kv_heads, original.vision_layers, original.merge) == (2, 3, 2)


# Published figures

MEAN_TOKENS = 3041.7
"""Vision tokens of a prompt in YOPO's figures for InternVL2: 11.88 tiles of 256."""


def yopo(shape: ModelShape, layers: int | None = None) -> float:
    """TFLOPs of the formula `4nd^2 + 2n^2 d + 3ndm`, which is quadratic in n, so three counts give it at any n."""
    counts = [macs.formula_macs(shape, [n] * (layers or shape.layers)) for n in (0, 1, 2)]
    square = (counts[2] - 2 * counts[1]) / 2
    return 2 * (square * MEAN_TOKENS**2 + (counts[1] - square) * MEAN_TOKENS) / 1e12


def test_yopos_figure_for_internvl2_4b_is_the_models_own():
    assert round(yopo(read_shape("internvl2-4b")), 2) == 25.68


@pytest.mark.parametrize(
    ("name", "changes", "printed", "cut", "printed_cut"),
    [
        ("internvl2-8b", {"mlp": 11008}, 44.25, 24, 33.19),
        ("internvl2-26b", {"mlp": 13824}, 129.4, 24, 64.7),
        ("qwen2-vl-7b", {"hidden": 4096, "mlp": 11008, "layers": 32}, 44.25, None, None),
    ],
)
def test_yopos_other_figures_are_those_of_llavas_mlp(name, changes, printed, cut, printed_cut):
    """With the width of MLP that LLaVA 7B and 13B have; the models' own give 18, 11 and 9 % more."""
    shape, digits = read_shape(name), 2 if printed < 100 else 1
    assert round(yopo(replace(shape, **changes)), digits) == printed
    assert yopo(shape) > 1.05 * printed
    if cut:
        assert round(yopo(replace(shape, **changes), cut), digits) == printed_cut


# The command


@pytest.mark.parametrize("name", NAMED)
def test_named_shapes_are_reported(name, capsys):
    assert cost.main(["--model", name, "--retain", "0.25"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{name}: {read_shape(name).vision_tokens} vision tokens")


def test_image_sizes_of_the_command(capsys):
    assert cost.main(["--model", "qwen2.5-vl-7b", "--image-size", "1288x952", "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens"]["full"] == 46 * 34 and facts["shape"]["grid"] == [68, 92]
    for words, said in (
        (["--model", "qwen2-vl-7b", "--image-size", "1000x1000"], "image_size is 1000x1000: both must be multiples"),
        (["--model", "internvl2-8b", "--image-size", "448x896"], "takes images of 448 x 448 pixels only"),
        (["--model", "qwen2-vl-7b", "--image-size", "large"], "'large' must be WIDTHxHEIGHT"),
    ):
        with contextlib.suppress(SystemExit):
            assert cost.main(words) == 2
        assert said in capsys.readouterr().err


def test_a_configuration_that_leaves_out_a_size_is_one_line(tmp_path):
    facts = internvl2.config()
    del facts["llm_config"]["intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="has no intermediate_size"):
        read_shape(str(tmp_path), is_path=True)


def test_yopo_of_named_shapes_is_planned_in_units(capsys, tmp_path):
    method = tmp_path / "yopo.yaml"
    method.write_text("method: yopo\nwindow: 3\nheads: 0.5\nlayer_cut: 24\n")
    assert cost.main(["--model", "qwen2-vl-7b", "--image-size", "840x560", "--yopo", str(method)]) == 0
    assert "600 vision tokens" in capsys.readouterr().out
