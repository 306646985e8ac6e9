"""LoRA: saved as LLaVA saves it, loaded back to the same logits, resumed, over quantised weights."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training import arguments, llava_base, write_records

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.train.arguments import DataArguments, ModelArguments
from llava.train.lora import ADAPTER_FILE, NON_LORA_FILE, adapted_names, add_lora, load_lora
from llava.train.train import make_records, make_trainer, train

LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "mm_projector_lr": 1e-3}
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, checkpoint):
    return llava_base(tmp_path_factory.mktemp("base") / "vicuna-like", checkpoint)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return DataArguments(data_path=str(write_records(folder)), image_folder=str(folder))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base, data):
    """The folder of two LoRA steps, and the model in memory that they gave."""
    output = tmp_path_factory.mktemp("lora") / "out"
    settings = arguments(output, **LORA)
    trainer = make_trainer(ModelArguments(str(base)), data, settings, make_records(data, ModelArguments("x"), 0))
    trainer.train()
    trainer.save_model()
    return output, trainer.model.eval()


def logits(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 7, 30, 31]])
    with torch.no_grad():
        return model(input_ids=ids, images=torch.randn(1, 3, 84, 84, generator=generator)).logits


def test_files_and_names_are_upstreams(trained):
    output, _ = trained
    names = set(load_file(output / "adapter_model.safetensors"))
    form = r"base_model\.model\.model\.layers\.\d\.(self_attn|mlp)\.\w+_proj\.lora_[AB]\.weight"
    assert len(names) == 8 * 7 * 2 and all(re.fullmatch(form, name) for name in names)
    rest = torch.load(output / NON_LORA_FILE, weights_only=True)
    assert set(rest) == {
        f"base_model.model.model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    adapter = json.loads((output / ADAPTER_FILE).read_text())
    assert sorted(adapter["target_modules"]) == LINEAR and (adapter["r"], adapter["lora_alpha"]) == (4, 8)
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "llava_llama" and config["tokenizer_model_max_length"] == 2048
    assert (output / "tokenizer_config.json").is_file() and (output / "preprocessor_config.json").is_file()
    assert not (output / "model.safetensors").exists()


def test_loaded_back_gives_the_trained_logits(trained, base):
    output, model = trained
    _, again, _, context = load_pretrained_model(str(output), model_base=str(base))
    _, before, _, _ = load_pretrained_model(str(base))
    assert context == 2048
    torch.testing.assert_close(logits(again), logits(model), atol=1e-3, rtol=1e-3)
    assert (logits(again) - logits(before)).abs().max() > 0.05


def test_only_adapters_and_projector_learn(trained):
    _, model = trained
    learn = [name for name, value in model.named_parameters() if value.requires_grad]
    assert all("lora_" in name or "mm_projector" in name for name in learn)
    assert not any("vision_tower" in name or "lm_head" in name for name in learn)
    moved = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert all(value.abs().sum() > 0 for value in moved)


def test_goes_on_from_a_checkpoint(trained, base, data, tmp_path):
    """Two steps and a third after a restart give the weights of three steps in one go."""
    model, settings = ModelArguments(str(base)), LORA | {"lora_dropout": 0.0, "lr_scheduler_type": "constant"}
    whole = train(model, data, arguments(tmp_path / "whole", **settings, max_steps=3))
    train(model, data, arguments(tmp_path / "parts", **settings, max_steps=2))
    parts = train(model, data, arguments(tmp_path / "parts", **settings, max_steps=3))
    for name in ("adapter_model.safetensors", "checkpoint-2/adapter_model.safetensors"):
        one, other = load_file(whole / name), load_file(parts / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (torch.load(folder / NON_LORA_FILE, weights_only=True) for folder in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_begins_with_given_adapters_or_names_what_does_not_fit(trained, base, tmp_path):
    output, model = trained
    _, plain, *_ = load_pretrained_model(str(base))
    assert adapted_names(plain) == LINEAR
    wrapped = add_lora(plain, arguments(output, **LORA))
    plain.get_model().mm_projector.requires_grad_(True)
    load_lora(wrapped, output)
    torch.testing.assert_close(logits(wrapped.eval()), logits(model))
    _, plain, *_ = load_pretrained_model(str(base))
    with pytest.raises(ValueError, match="LoRA weights: .* does not fit"):
        load_lora(add_lora(plain, arguments(output, **LORA | {"lora_r": 2})), output)
    with pytest.raises(ValueError, match="LoRA weights: "):
        load_lora(wrapped, base)
    kept = wrapped.state_dict()["base_model.model.model.mm_projector.0.weight"].clone()
    bare = shutil.copytree(output, tmp_path / "bare", ignore=shutil.ignore_patterns(NON_LORA_FILE, "checkpoint-*"))
    load_lora(wrapped, bare)  # a plain PEFT adapter leaves the projector as it is
    torch.testing.assert_close(wrapped.state_dict()["base_model.model.model.mm_projector.0.weight"], kept)


@pytest.mark.parametrize("bits", [4, 8])
def test_over_quantised_weights(base, data, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    settings = arguments(tmp_path / "out", **LORA, bits=bits, max_steps=1)
    model = ModelArguments(str(base))
    trainer = make_trainer(model, data, settings, make_records(data, model, 0))
    inner = trainer.model.base_model.model
    kind = type(inner.model.layers[0].mlp.up_proj.base_layer).__name__
    assert kind == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    tower = inner.get_vision_tower().vision_tower
    for part in (inner.model.mm_projector[0], inner.lm_head, tower.encoder.layers[0].mlp.fc1):
        assert type(part) is torch.nn.Linear
    trainer.train()
    trainer.save_model()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    _, again, *_ = load_pretrained_model(str(tmp_path / "out"), model_base=str(base))
    assert logits(again).isfinite().all()
