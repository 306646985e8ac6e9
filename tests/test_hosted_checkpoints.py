"""Folders of stock models: loaded with their processor, evaluated, and refused in one line."""

import json
import shutil

import numpy as np
import pytest
import stock
import stock_folders
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import is_torchvision_available

from eval.checkpoints import check_checkpoint
from eval.run import command as run
from eval.run.inference import LoadedModel
from eval.run.lmms import LlavaMustDrop
from llava.model.builder import load_pretrained_model
from llava.model.hosted.pixels import limited
from llava.video import Video
from mustdrop import load_reducer

KINDS = [
    ("llava", "qwen2"),
    ("next", "mistral"),
    ("onevision", "qwen2"),
    ("video", "llama"),
    ("qwen2", "qwen2"),
    ("qwen2.5", "qwen2"),
    ("qwen3", "qwen3"),
    ("internvl", "qwen2"),
]
TEXTS = dict(KINDS)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(kind))
def folder(request, tmp_path_factory, tokenizer_folder):
    return stock_folders.save(tmp_path_factory.mktemp("stock") / request.param[0], *request.param, tokenizer_folder)


def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype="uint8")) for size in stock.SIZES]


def refused(path, match: str, **how) -> None:
    with pytest.raises(ValueError, match=match) as error:
        load_pretrained_model(path, **how)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_stock_folder_loads_with_its_processor_and_takes_a_reducer(folder):
    tokenizer, model, processor, context = load_pretrained_model(folder, device="cpu")
    assert type(model).__name__.endswith("ForConditionalGeneration") and not model.training
    assert processor.tokenizer is tokenizer and context == model.config.text_config.max_position_embeddings
    turn = [{"type": "image"}, {"type": "text", "text": "the dog and the cat"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
    given = processor(images=images(), text=[prompt] * 2, padding=True, padding_side="left", return_tensors="pt")
    with load_reducer({"method": "fastv", "layer": 2, "drop_ratio": 0.5}).on(model) as traces:
        model.generate(**given, max_new_tokens=2, do_sample=False)
    for trace in traces.traces:
        assert 0 < trace.vision_tokens_after[-1] < trace.vision_tokens[0]


def test_stock_folder_is_looked_over_and_evaluated(folder, tmp_path, capsys):
    assert check_checkpoint(str(folder))["model"] == str(folder)
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "visionzip_9.yaml").write_text("method: visionzip\nretain: 9\n")
    words = ["--task", "mini_gqa", "--model", str(folder), "--method", "visionzip", "--retain", "9", "--limit", "3"]
    assert run.main([*words, "--configs", str(configs), "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert len(rows) == 2 and "visionzip" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["missing", "foreign", "shape"])
@pytest.mark.parametrize(
    ("family", "weight"),
    [
        ("next", "image_newline"),
        ("qwen2.5", "merger.mlp.0.bias"),
        ("qwen3", "pos_embed.weight"),
        ("internvl", "lambda_1"),
    ],
)
def test_weights_of_a_stock_folder_that_do_not_fit_are_named(tmp_path, tokenizer_folder, family, weight, change):
    folder = stock_folders.save(tmp_path / family, family, TEXTS[family], tokenizer_folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(weight))
    if change == "missing":
        del weights[name]
    elif change == "foreign":
        weights["model.resampler.weight"] = torch.zeros(2, 2)
    else:
        weights[name] = torch.zeros(7)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    named = "resampler" if change == "foreign" else weight.split(".")[0]
    refused(folder, f"1 weights (are missing or of another shape|have no place).*{named}")


@pytest.mark.parametrize("family", ["next", "qwen2", "qwen2.5", "qwen3", "internvl"])
def test_stock_folders_that_cannot_be_hosted_are_refused_in_one_line(tmp_path, tokenizer_folder, family):
    folder = stock_folders.save(tmp_path / "llava-v1.5-7b-lora", family, TEXTS[family], tokenizer_folder)
    facts = json.loads((folder / "config.json").read_text())
    kind = facts["model_type"]
    refused(folder, f"model_base is 'x': {kind} is a whole model", model_base="x")
    refused(folder, f"compile: {kind} is transformers' own class", compile=True)
    refused(folder, f"protocol is 'flat': {kind} is transformers' own class", protocol="flat")
    for part, other in (("text_config", "gemma"), ("vision_config", "pixtral")):
        changed = {**facts, part: {**facts[part], "model_type": other}}
        (folder / "config.json").write_text(json.dumps(changed))
        refused(folder, rf"{part}.model_type is '{other}': supported are|config.json: ")
        with pytest.raises(ValueError, match="MODEL: .*(model_type|config.json)"):
            check_checkpoint(str(folder))
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "model.safetensors").rename(folder / "away")
    refused(folder, "weights")
    (folder / "away").rename(folder / "model.safetensors")
    (folder / "preprocessor_config.json").unlink()
    refused(folder, "no processor can be read")


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen2.5"])
def test_configurations_as_qwen_has_published_them(tmp_path, tokenizer_folder, family):
    """The text model's fields beside the others, the kind of rotary embedding under its old name."""
    folder = stock_folders.save(tmp_path / family, family, "qwen2", tokenizer_folder)
    ids = torch.randint(3, 140, (1, 9))
    logits = load_pretrained_model(folder, device="cpu")[1](input_ids=ids).logits
    facts = json.loads((folder / "config.json").read_text())
    text, rope = facts.pop("text_config"), {}
    rope = text.pop("rope_parameters")
    flat = {name: value for name, value in text.items() if name not in ("model_type", "layer_types", "dtype")}
    facts |= flat | {"rope_theta": rope["rope_theta"], "sliding_window": 32768, "use_sliding_window": False}
    facts["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    facts["vision_config"] = {
        k: v for k, v in facts["vision_config"].items() if k not in ("model_type", "rope_parameters")
    }
    (folder / "config.json").write_text(json.dumps(facts))
    tokenizer, model, _, context = load_pretrained_model(folder, model_name="llava-v1.5-7b", device="cpu")
    assert torch.equal(model(input_ids=ids).logits, logits) and context == 32768
    with load_reducer({"method": "fastv", "layer": 2, "drop_ratio": 0.5}).on(model):
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=0, atol=2e-6)


@pytest.fixture(scope="module", params=[("qwen2", "qwen2"), ("qwen2.5", "qwen2"), ("qwen3", "qwen3")], ids="-".join)
def qwen(request, tmp_path_factory, tokenizer_folder):
    return stock_folders.save(tmp_path_factory.mktemp("qwen") / "folder", *request.param, tokenizer_folder)


@torch.no_grad()
def test_smallimage_is_the_pixel_budget_of_the_processor(qwen):
    tokenizer, model, processor, _ = load_pretrained_model(qwen, device="cpu")
    shown = [Image.new("RGB", size, "blue") for size in ((300, 200), (150, 420), (60, 60), (1400, 30))]

    def prepared(processor):
        prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
        return processor(
            images=shown, text=[prompt] * len(shown), padding=True, padding_side="left", return_tensors="pt"
        )

    def tokens(processor):
        return (prepared(processor)["image_grid_thw"].prod(-1) // 4).tolist()

    whole, side = tokens(processor), processor.image_processor.patch_size * 2
    for settings in ({"method": "smallimage", "retain": 12}, {"method": "smallimage", "retain": 2}):
        reducer = load_reducer(settings)
        small = limited(processor, reducer)
        found, retain = tokens(small), settings["retain"]
        assert max(found[:3]) <= retain < max(whole) and small.image_processor.size["longest_edge"] == retain * side**2
        with reducer.on(model) as run:
            model.generate(**prepared(small), max_new_tokens=2, do_sample=False)
        assert [trace.vision_tokens[0] for trace in run.traces] == found
        with pytest.raises(ValueError, match=f"retain is {retain}: it must be"), reducer.on(model):
            model.generate(**prepared(processor), max_new_tokens=2, do_sample=False)
    assert tokens(processor) == whole  # the processor itself is what it was
    assert limited(processor, load_reducer({"method": "fastv", "layer": 2, "drop_ratio": 0.5})) is processor


@pytest.mark.parametrize("retain", [36, 108, 150, 10000])
def test_smallimage_of_internvl_is_a_number_of_tiles(tmp_path, tokenizer_folder, retain):
    folder = stock_folders.save(tmp_path / "internvl", "internvl", "qwen2", tokenizer_folder)
    _, model, processor, _ = load_pretrained_model(folder, device="cpu")
    small = limited(processor, load_reducer({"method": "smallimage", "retain": retain}))
    pixels = small(images=[Image.new("RGB", (900, 600))], text=["<IMG_CONTEXT>"], return_tensors="pt")["pixel_values"]
    tiles = {36: 1, 108: 3, 150: 4, 10000: 7}[retain]  # a thumbnail among them where there are several
    assert len(pixels) <= tiles and 36 * tiles <= max(retain, 36)
    assert len(pixels) == {36: 1, 108: 3, 150: 3, 10000: 7}[retain]
    with pytest.raises(ValueError, match="retain is 35: it must be at least 36, the tokens of one tile"):
        limited(processor, load_reducer({"method": "smallimage", "retain": 35}))


@pytest.mark.parametrize(("family", "text"), [("qwen2.5", "qwen2"), ("internvl", "qwen2")])
def test_the_plugin_asks_with_smaller_images(tmp_path, tokenizer_folder, family, text):
    loaded = LoadedModel.load(str(stock_folders.save(tmp_path / family, family, text, tokenizer_folder)), device="cpu")
    plugin = LlavaMustDrop(loaded=loaded, method="smallimage", retain=36)
    prepared = plugin._prepare(["the dog"], [[Image.new("RGB", (900, 600))]])
    texts, traces = plugin._generate(prepared, {"max_new_tokens": 2, "do_sample": False})
    assert len(texts) == 1 and 0 < traces[0].vision_tokens[0] <= 36
    whole = loaded.prepare([loaded.prompt("the dog", 1)], [[Image.new("RGB", (900, 600))]])
    assert len(whole["input_ids"][0]) > len(prepared["input_ids"][0])


@pytest.mark.parametrize("family", ["qwen2", "internvl"])
def test_videos_are_asked_about_or_refused_in_one_line(tmp_path, tokenizer_folder, family):
    loaded = LoadedModel.load(
        str(stock_folders.save(tmp_path / family, family, TEXTS[family], tokenizer_folder)), device="cpu"
    )
    clip = Video(tuple(Image.new("RGB", (60, 40), (shade, 0, 0)) for shade in (0, 90, 180)))
    prompt = loaded.prompt_about("what moves", [clip])
    if family == "qwen2" and not is_torchvision_available():
        with pytest.raises(ValueError, match="it shows a video, but qwen2_vl needs torchvision for videos"):
            loaded.prepare([prompt], [[clip]])
        return
    with load_reducer({"method": "uniform", "retain": 9}).on(loaded.model) as run:
        loaded.answer([prompt], [[clip]], max_new_tokens=2, do_sample=False)
    assert run.traces[0].vision_tokens[0] == (27 if family == "internvl" else 9)  # its frames are images


@pytest.mark.parametrize("kind", ["qwen2_vl", "internvl"])
def test_a_llava_that_says_it_is_another_model_is_refused(checkpoint, tmp_path, kind):
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "model_type": kind}))
    refused(folder, "no processor can be read|weights are missing|model_type is|config.json: ")
