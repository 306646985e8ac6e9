"""Folders of stock models: loaded with their processor, evaluated, and refused in one line."""

import json

import numpy as np
import pytest
import stock
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eval.checkpoints import check_checkpoint
from eval.run import command as run
from llava.model.builder import load_pretrained_model
from mustdrop import load_reducer

KINDS = [("llava", "qwen2"), ("next", "mistral"), ("onevision", "qwen2"), ("video", "llama")]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(kind))
def folder(request, tmp_path_factory, tokenizer_folder):
    return stock.save(tmp_path_factory.mktemp("stock") / request.param[0], *request.param, tokenizer_folder)


@pytest.fixture
def other(tmp_path, tokenizer_folder):
    return stock.save(tmp_path / "next", "next", "llama", tokenizer_folder)


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
def test_weights_of_a_stock_folder_that_do_not_fit_are_named(other, change):
    file = other / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("image_newline"))
    if change == "missing":
        del weights[name]
    elif change == "foreign":
        weights["model.resampler.weight"] = torch.zeros(2, 2)
    else:
        weights[name] = torch.zeros(7)
    save_file(weights, file, {"format": "pt"})
    refused(other, "1 weights (are missing or of another shape|have no place)")


def test_stock_folders_that_cannot_be_hosted_are_refused_in_one_line(other):
    refused(other, "model_base is 'x': llava_next is a whole model", model_base="x")
    refused(other, "compile: llava_next is transformers' own class", compile=True)
    facts = json.loads((other / "config.json").read_text())
    for part, kind in (("text_config", "gemma"), ("vision_config", "pixtral")):
        changed = {**facts, part: {**facts[part], "model_type": kind}}
        (other / "config.json").write_text(json.dumps(changed))
        refused(other, rf"{part}.model_type is '{kind}': supported are")
        with pytest.raises(ValueError, match="MODEL: .*model_type"):
            check_checkpoint(str(other))
    (other / "config.json").write_text(json.dumps(facts))
    (other / "model.safetensors").unlink()
    refused(other, "weights")
