"""InternVL2's own checkpoints, translated at loading, against the original restated in plain torch."""

import json

import internvl2
import numpy as np
import pytest
import torch
from hosted import KeepAll
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration, LlamaForCausalLM

from eval.checkpoints import check_checkpoint
from llava.model.builder import load_pretrained_model
from llava.model.convert import internvl_config, internvl_weights
from mustdrop import available_methods, load_reducer

SETTINGS = {
    "mustdrop": {"window": 2, "filter_layers": [1, 2], "similarity_threshold": -1.0},
    "mustdrop_plus": {"retain": 6, "window": 2, "filter_layers": [1, 2]},
    "tome": {"retain": 2, "per": "view"},
    "fastv": {"layer": 2, "drop_ratio": 0.5},
    "dart": {"layer": 2, "tokens": 6},
    "pyramiddrop": {"layers": [1, 2], "ratios": [0.6, 0.4]},
    "sparsevlm": {"layers": [1, 2], "keeps": [0.6, 0.4]},
    "yopo": {"window": 3, "heads": 0.5, "mlp_share": 0.5, "layer_cut": 3},
}
ROWS = [("internlm2", "300m"), ("internlm2", "6b"), ("phi3", "300m"), ("qwen2", "300m")]


@pytest.fixture(scope="module", params=ROWS, ids="-".join)
def saved(request, tmp_path_factory):
    return request.param, *internvl2.save(tmp_path_factory.mktemp("internvl") / "InternVL2", *request.param)


@pytest.fixture
def folder(tmp_path):
    return internvl2.save(tmp_path / "InternVL2")[0]


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype="uint8"))


def turn(*parts: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": kind} if kind == "image" else text(kind) for kind in parts]}]


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def rewrite(folder, **changes) -> None:
    facts = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        (facts[part] if part else facts)[field] = value
    (folder / "config.json").write_text(json.dumps(facts))


def refused(folder, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        load_pretrained_model(folder, device="cpu")
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_a_folder_loads_as_transformers_own_class_and_computes_what_the_original_does(saved):
    (kind, _), folder, original = saved
    tokenizer, model, processor, context = load_pretrained_model(folder, device="cpu")
    assert type(model) is InternVLForConditionalGeneration and context == 256 and not model.training
    prompt = processor.apply_chat_template(turn("image", "look at the dog"), add_generation_prompt=True)
    given = processor(images=[picture(100, 60)], text=[prompt], return_tensors="pt")
    ids = given["input_ids"]
    assert (ids == model.config.image_token_id).sum() == internvl2.TOKENS * len(given["pixel_values"])
    wanted = original(ids, given["pixel_values"], model.config.image_token_id)
    torch.testing.assert_close(model(**given).logits, wanted, rtol=0, atol=2e-6)
    ends = {"phi3": "<|end|>"}.get(kind, "<|im_end|>")
    assert model.generation_config.eos_token_id[0] == tokenizer.convert_tokens_to_ids(ends)


@torch.no_grad()
def test_positions_beyond_the_trained_length_are_scaled(saved):
    """InternLM2 by dynamic NTK, Phi-3 by its long factors."""
    _, folder, original = saved
    model = load_pretrained_model(folder, device="cpu")[1]
    ids = torch.randint(3, 200, (1, 300))
    found = model(input_ids=ids).logits
    torch.testing.assert_close(found, original(ids), rtol=0, atol=5e-5)
    if saved[0][0] != "qwen2":
        first = model(input_ids=ids[:, :50]).logits
        assert (found[:, :50] - first).abs().max() > 1e-3  # the early tokens' angles change, too


@torch.no_grad()
def test_internlm2_of_the_golden_outputs(golden):
    stored = load_file(golden / "models" / "internlm2.safetensors")
    facts = internvl2.config("internlm2", rows=200)
    facts["llm_config"] |= {"num_hidden_layers": 3, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
    config = internvl_config.translated(facts)
    weights = {"language_model." + name.removeprefix("weights."): value for name, value in stored.items()}
    weights = {name: value for name, value in weights.items() if name.count(".") > 1}
    weights = internvl_weights.translated(weights, config)
    model = LlamaForCausalLM._from_config(config.text_config, attn_implementation="eager").eval()
    model.load_state_dict({name.replace("language_model.", ""): value for name, value in weights.items()})
    for ids, logits, near in (("ids", "logits", 2e-6), ("long", "long_logits", 2.5e-6)):  # 90 of 64 trained positions
        torch.testing.assert_close(model(input_ids=stored[ids]).logits, stored[logits], rtol=0, atol=near)


def test_the_prompt_is_the_one_that_the_checkpoint_was_trained_with(saved):
    (kind, _), folder, _ = saved
    processor = load_pretrained_model(folder, device="cpu")[2]
    prompt = processor.apply_chat_template(turn("image", "a sign"), add_generation_prompt=True)
    names, end = {"phi3": (("<|system|>", "<|user|>", "<|assistant|>"), "<|end|>")}.get(
        kind, (("<|im_start|>system", "<|im_start|>user", "<|im_start|>assistant"), "<|im_end|>")
    )
    system, user, assistant = names
    assert prompt.startswith(f"{system}\n你是由上海人工智能实验室") and prompt.count(end) == 2
    assert prompt.endswith(f"{end}{user}\n<IMG_CONTEXT>\na sign{end}{assistant}\n")
    own = [{"role": "system", "content": "be brief"}, *turn("a sign")]
    assert processor.apply_chat_template(own) == f"{system}\nbe brief{end}{user}\na sign{end}"


def test_internlm2s_tokens_need_no_code_of_the_checkpoint(folder):
    """Special tokens take the places of unused pieces; every stretch of text is cut by sentencepiece alone."""
    tokenizer = load_pretrained_model(folder, device="cpu")[0]
    ids = tokenizer("<|im_start|>user\n the dog<|im_end|><img></img>")["input_ids"]
    start, end, image = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<img>"])
    pieces = tokenizer.sp_model
    assert (end, start) == tuple(pieces.piece_to_id(f"[UNUSED_TOKEN_{index}]") for index in range(2))
    assert ids == [1, start, *pieces.encode("user\n the dog"), end, image, image + 1]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "user\n the dog"
    assert tokenizer.pad_token == "</s>"


@pytest.mark.parametrize(("width", "height", "tiles"), [(50, 50, 2), (170, 56, 3), (60, 240, 4), (400, 390, 9)])
def test_tiles_are_those_of_the_closest_aspect_ratio_and_a_thumbnail(folder, width, height, tiles):
    processor, side = load_pretrained_model(folder, device="cpu")[2], internvl2.PIXELS
    found = processor.image_processor(picture(width, height), return_tensors="pt")
    columns = {2: 1, 3: 3, 4: 1, 9: 3}[tiles]
    if width == 50:  # no more tiles than the image has pixels for
        tiles = columns = 1
    assert found["num_patches"].tolist() == [tiles + (tiles > 1)]
    canvas = picture(width, height).resize((side * columns, side * (tiles // columns)), Image.Resampling.BICUBIC)
    last = picture(width, height).resize((side, side), Image.Resampling.BICUBIC)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    for index, wanted in ((0, canvas.crop((0, 0, side, side))), (-1, last)):
        pixels = torch.from_numpy(np.array(wanted)).permute(2, 0, 1) / 255
        torch.testing.assert_close(found["pixel_values"][index], (pixels - mean) / std, rtol=0, atol=1e-5)


def test_one_tile_where_the_configuration_says_so(folder):
    rewrite(folder, dynamic_image_size=False)
    processor = load_pretrained_model(folder, device="cpu")[2]
    given = processor(images=[picture(300, 60)], text=["<IMG_CONTEXT>\nthe dog"], return_tensors="pt")
    assert len(given["pixel_values"]) == 1


@torch.no_grad()
def test_every_method_works_on_it(saved):
    _, folder, _ = saved
    _, model, processor, _ = load_pretrained_model(folder, device="cpu")
    prompt = processor.apply_chat_template(turn("image", "look"), add_generation_prompt=True)
    given = processor(images=[picture(100, 60)], text=[prompt], return_tensors="pt")
    tokens = internvl2.TOKENS * len(given["pixel_values"])
    for name in available_methods():
        if name in ("vanilla", "evs", "smallimage"):
            continue
        settings = SETTINGS.get(name, {"retain": 6})
        with load_reducer({"method": name, **settings}).on(model) as run:
            logits = model.generate(
                **given, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
            ).logits
        assert torch.stack(logits).isfinite().all()
        (trace,) = run.traces
        assert [image["patches"] for image in trace.images] == [tokens], name
        assert trace.vision_tokens_after[-1] < tokens, name


@torch.no_grad()
def test_keeping_all_under_a_reducer_equals_the_original(saved):
    _, folder, original = saved
    _, model, processor, _ = load_pretrained_model(folder, device="cpu")
    prompt = processor.apply_chat_template(turn("image", "look"), add_generation_prompt=True)
    given = processor(images=[picture(100, 60)], text=[prompt], return_tensors="pt")
    wanted = original(given["input_ids"], given["pixel_values"], model.config.image_token_id)
    with KeepAll().on(model):
        torch.testing.assert_close(model(**given).logits, wanted, rtol=0, atol=3e-6)


@pytest.mark.parametrize("change", ["missing", "foreign", "shape"])
def test_weights_that_do_not_fit_are_named(folder, change):
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    if change == "missing":
        del weights["mlp1.1.weight"]
    elif change == "foreign":
        weights["language_model.model.layers.9.attention.wqkv.weight"] = weights[
            next(name for name in weights if name.endswith("wqkv.weight"))
        ].clone()
    else:
        weights["mlp1.1.bias"] = torch.zeros(7)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = {
        "missing": r"1 weights are missing or of another shape \(model.multi_modal_projector.linear_1.weight\)",
        "foreign": r"3 weights have no place in the model \(model.language_model.layers.9.self_attn.k_proj",
        "shape": r"1 weights are missing or of another shape \(model.multi_modal_projector.linear_1.bias\)",
    }
    refused(folder, said[change])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("ps_version", "v1", "ps_version is 'v1': only 'v2' is supported"),
        ("use_thumbnail", False, "use_thumbnail is False"),
        ("use_llm_lora", 16, "use_llm_lora is 16"),
        ("pad2square", True, "pad2square is True"),
        ("template", "vicuna_v1.1", "template is 'vicuna_v1.1': it must be internlm2-chat"),
        ("force_image_size", 224, "force_image_size is 224: it must be vision_config's image_size, 56"),
        ("downsample_ratio", 0.3, "downsample_ratio is 0.3: it must be 1/n"),
        ("max_dynamic_patch", 0, "max_dynamic_patch 0: 1 <= min <= max"),
        ("llm_config", None, "llm_config is None: it must be an object"),
        ("llm_config__architectures", ["Gemma2ForCausalLM"], "llm_config.architectures is .*Gemma2ForCausalLM"),
        ("llm_config__rope_scaling", {"type": "ntk", "factor": 2}, "llm_config.rope_scaling.type is 'ntk'"),
        ("llm_config__num_key_value_heads", 4, "wqkv.weight has 96 rows, which are not those of config.json's heads"),
        ("llm_config__vocab_size", 300, r"tokenizer: has tokens up to \d+ \('<IMG_CONTEXT>'\), but llm_config.vocab"),
        ("vision_config__layer_norm_eps", 1e-5, None),
        ("vision_config__patch_size", 15, "image_size is 56 and patch_size 15: one must divide the other"),
        ("vision_config__hidden_size", "x", "config.json describes no InternVL"),
    ],
)
def test_fields_that_are_not_computed_are_refused_by_name(folder, field, value, said):
    rewrite(folder, **{field: value})
    if said is None:
        return
    refused(folder, said)
    if "wqkv" not in said:
        with pytest.raises(ValueError, match="MODEL: "):
            check_checkpoint(str(folder))


def test_a_tokenizer_without_the_marks_of_images_is_refused(folder):
    file = folder / "tokenizer_config.json"
    facts = json.loads(file.read_text())
    facts["added_tokens_decoder"] = {
        index: token for index, token in facts["added_tokens_decoder"].items() if token["content"] != "</img>"
    }
    facts["additional_special_tokens"].remove("</img>")
    file.write_text(json.dumps(facts))
    refused(folder, "tokenizer: has no token </img>")
