"""Every form in which people have checkpoints loads as what it is: the logits are those of Hugging Face's own class.

docs/checkpoints.md names these tests.
"""

import json
import logging
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import forms
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from eval.run.inference import LoadedModel
from eval.tasks import mini_gqa
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint.config import translate
from llava.train.train import ModelArguments, TrainingArguments, load_model
from mustdrop import load_reducer

HUB_NAME = "openai/clip-vit-large-patch14-336"
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    return list(mini_gqa.documents(4))[:10]


@pytest.fixture(scope="module")
def expected(documents):
    """Ids of the first question, and the logits that transformers computes from the folder itself."""
    loaded = LoadedModel(*load_pretrained_model(forms.MINI))
    ids = loaded.encode(loaded.prompt(documents[0]["question"], 1))[None]
    pixels = process_images([documents[0]["image"]], loaded.image_processor, loaded.model.config)
    theirs = LlavaForConditionalGeneration.from_pretrained(forms.MINI, dtype=torch.float32).eval()
    token = theirs.config.image_token_id
    expanded = [t for i in ids[0].tolist() for t in ([token] * 576 if i == IMAGE_TOKEN_INDEX else [i])]
    with torch.no_grad():
        return ids, theirs(input_ids=torch.tensor([expanded]), pixel_values=pixels).logits[0, -1]


def load(path, base=None, **settings) -> LoadedModel:
    return LoadedModel(*load_pretrained_model(path, base, **settings))


@torch.no_grad()
def logits(loaded: LoadedModel, documents, ids) -> torch.Tensor:
    pixels = process_images([documents[0]["image"]], loaded.image_processor, loaded.model.config)
    return loaded.model(input_ids=ids, images=pixels).logits[0, -1]


def right_answers(loaded: LoadedModel, documents) -> int:
    prompts = [loaded.prompt(document["question"], 1) for document in documents]
    answers = loaded.answer(prompts, [[document["image"]] for document in documents], max_new_tokens=6)
    return sum(answer == document["answer"] for answer, document in zip(answers, documents, strict=True))


@pytest.fixture
def check(documents, expected):
    def compare(path, base=None, tolerance: float = 1e-4, **settings) -> LoadedModel:
        loaded = load(path, base, **settings)
        torch.testing.assert_close(logits(loaded, documents, expected[0]), expected[1], atol=tolerance, rtol=0)
        return loaded

    return compare


@pytest.mark.parametrize("generation", ["old", "new", "newest"])
def test_hugging_face_under_the_names_of_every_generation(check, tmp_path, generation):
    check(forms.hugging_face(tmp_path / "hf", generation, "bin" if generation == "old" else "safetensors"))


def test_original_with_the_first_stages_projector_beside_it_answers_right(check, documents, tmp_path):
    loaded = check(forms.full(tmp_path / "llava-v1.5-merged-lora"))
    assert right_answers(loaded, documents) == 10


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_original_with_the_tower_inside(check, tmp_path, suffix):
    noise = {"CLIP": torch.randn(3)}
    named = forms.clip(tmp_path / "another")  # what lies in the checkpoint wins: it may have been trained
    state = {name: torch.randn_like(value) for name, value in forms.weights()["tower"].items()} | noise
    save_file(state, named / "model.safetensors")
    check(forms.full(tmp_path / "x", inside=True, suffix=suffix, tower=str(named), unfreeze_mm_vision_tower=True))


def test_original_with_openais_tower_inside_needs_no_hub(check, tmp_path):
    loaded = check(forms.full(tmp_path / "x", inside=True, tower=HUB_NAME))
    assert loaded.image_processor.crop_size["height"] == 336


def test_original_with_the_tower_in_a_folder_beside_it(check, tmp_path):
    forms.clip(tmp_path / "tower")
    check(forms.full(tmp_path / "x", tower="../tower"))


def test_tower_that_is_a_whole_clip(check, tmp_path):
    whole = forms.write_config(tmp_path / "clip", model_type="clip", vision_config=forms.config_of("vision_config"))
    state = forms.weights()["tower"] | {"text_model.x": torch.ones(2), "logit_scale": torch.tensor(1.0)}
    torch.save(state, whole / "pytorch_model.bin")
    loaded = check(forms.full(tmp_path / "x", tower=str(whole)))
    assert list(loaded.image_processor.image_mean) == list(forms.CLIP_MEAN)


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_projector_only_on_its_language_model(check, tmp_path, model_type):
    check(forms.projector_only(tmp_path / "x", model_type=model_type), forms.vicuna(tmp_path / "vicuna"))


def test_training_checkpoint_of_the_first_stage_is_a_projector(check, tmp_path):
    folder = forms.projector_only(tmp_path / "run" / "checkpoint-100")
    (folder / "trainer_state.json").write_text("{}")
    check(folder, forms.vicuna(tmp_path / "vicuna"))


def test_projector_beside_a_language_model_in_one_folder(check, tmp_path):
    folder = forms.projector_only(forms.vicuna(tmp_path / "x"))
    check(folder)


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_lora_as_llava_saves_it(check, documents, tmp_path, model_type):
    folder = forms.lora(tmp_path / "anything", tmp_path / "vicuna", model_type=model_type)
    loaded = check(folder, tmp_path / "vicuna")
    if model_type == "llava":
        assert right_answers(loaded, documents) == 10
        check(folder)  # the adapter's settings name the base


def test_lora_whose_other_weights_bear_another_prefix(check, tmp_path):
    folder = forms.lora(tmp_path / "x", tmp_path / "vicuna")
    extra = {f"model.{name}": value for name, value in forms.weights()["projector"].items()}
    torch.save(extra, folder / "non_lora_trainables.bin")
    check(folder, tmp_path / "vicuna")


@pytest.mark.parametrize("base", ["original", "hugging face"])
def test_plain_peft_adapter_on_a_llava(check, tmp_path, base):
    matrices, _ = forms.lora_weights()
    names = {name: name if base == "original" else f"language_model.{name}" for name in matrices}
    if base == "original":
        folder = forms.full(tmp_path / "base", inside=True)
        forms.write_shards(folder, forms.without_lora(forms.original_state(inside=True)), "bin")
    else:
        folder = forms.hugging_face(tmp_path / "base", "old", "bin", forms.without_lora(forms.weights()["text"]))
    adapter = {names[name]: value for name, value in matrices.items()}
    forms.add_adapter(tmp_path / "adapter", str(folder), adapter, "safetensors", target_modules=r".*\.q_proj")
    check(tmp_path / "adapter")


def test_adapter_with_ranks_and_scales_of_its_own(check, tmp_path):
    """`rank_pattern`, `alpha_pattern` and rank-stabilised scaling are PEFT's to read."""
    folder = forms.lora(tmp_path / "x", tmp_path / "vicuna")
    settings = json.loads((folder / "adapter_config.json").read_text())
    changes = {"alpha_pattern": {"q_proj": 1}, "lora_alpha": 50, "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
    check(folder, tmp_path / "vicuna")


def test_weights_that_an_adapter_saves_whole_take_the_place_of_the_bases(check, tmp_path):
    folder = forms.lora(tmp_path / "x", tmp_path / "vicuna")
    (folder / "non_lora_trainables.bin").unlink()
    whole = dict(forms.weights()["projector"])
    whole["lm_head.weight"] = forms.weights()["text"]["lm_head.weight"]
    text = forms.without_lora(forms.weights()["text"]) | {"lm_head.weight": torch.zeros(269, 128)}
    torch.save(text, tmp_path / "vicuna" / "pytorch_model.bin")
    settings = {"modules_to_save": ["lm_head", "mm_projector"]}
    forms.add_adapter(folder, None, forms.lora_weights()[0] | whole, **settings)
    check(folder, tmp_path / "vicuna")


def test_shards_without_an_index_and_the_same_weights_in_both_formats(check, tmp_path):
    folder = forms.full(tmp_path / "x", suffix="safetensors")
    (folder / "model.safetensors.index.json").unlink()
    torch.save(forms.original_state(), folder / "pytorch_model.bin")
    check(folder)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_on_the_way_in_and_saved_so(documents, tmp_path, bits):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    loaded = load(forms.full(tmp_path / "x"), **{f"load_{bits}bit": True})
    packed = {name for name, part in loaded.model.named_modules() if isinstance(part, Linear4bit | Linear8bitLt)}
    assert len(packed) == 7 * 16 and all(name.startswith("model.layers.") for name in packed)
    assert loaded.dtype.is_floating_point
    assert right_answers(loaded, documents) >= 9
    question = [loaded.prompt("Is there a circle?", 1)], [[documents[0]["image"]]]
    with load_reducer({"method": "mustdrop", "filter_layers": [2, 6]}).on(loaded.model) as run:
        loaded.answer(*question, max_new_tokens=2)
    assert run.traces[0].vision_tokens[-1] < 576
    with (
        load_reducer({"method": "yopo", "mlp_share": 0.5}).on(loaded.model),
        pytest.raises(ValueError, match="Linear.*cannot be computed in part, it must be plain"),
    ):
        loaded.answer(*question, max_new_tokens=2)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    state, other = loaded.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in other if isinstance(other[name], torch.Tensor))
    with pytest.raises(ValueError, match="load_8bit, load_4bit: .*quantised already"):
        load(tmp_path / "saved", **{f"load_{12 - bits}bit": True})


@needs_bitsandbytes
def test_quantised_adapter_is_merged_before_it_is_packed(tmp_path):
    folder = forms.lora(tmp_path / "x", tmp_path / "vicuna")
    folders = folder, forms.full(tmp_path / "full")
    merged, direct = (load(folder, load_4bit=True).model.state_dict() for folder in folders)
    packed = [name for name in direct if name.endswith("q_proj.weight")]
    assert sum((merged[name] != direct[name]).sum() for name in packed) < 10  # of 131,072 bytes


@needs_bitsandbytes
def test_adapter_on_a_base_that_is_saved_packed_is_merged_with_a_warning(tmp_path):
    base = load(forms.full(tmp_path / "x", inside=True), load_8bit=True)
    base.model.save_pretrained(tmp_path / "packed")
    base.tokenizer.save_pretrained(tmp_path / "packed")
    matrices, added = forms.lora_weights()
    forms.add_adapter(tmp_path / "adapter", str(tmp_path / "packed"), matrices)
    with pytest.warns(UserWarning, match="rounding errors"):
        merged = load(tmp_path / "adapter").model.get_submodule("model.layers.0.self_attn.q_proj").weight
    before = base.model.get_submodule("model.layers.0.self_attn.q_proj").weight
    change = (merged.data.float() * merged.SCB[:, None] - before.data.float() * before.SCB[:, None]) / 127
    expected = added["model.layers.0.self_attn.q_proj.weight"]
    assert (change - expected).abs().mean() < 0.3 * expected.abs().mean()


def test_what_save_pretrained_writes_alone_brings_the_right_processor(check, tmp_path):
    loaded = load(forms.MINI)
    loaded.model.get_vision_tower().image_processor = None  # a model made without load_pretrained_model
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    again = check(tmp_path).image_processor
    assert (again.crop_size["height"], again.size["shortest_edge"]) == (336, 336)
    assert list(again.image_mean) == list(forms.CLIP_MEAN)


def test_the_processor_that_a_model_was_loaded_with_is_saved_with_it(tmp_path):
    tokenizer, model, processor, _ = load_pretrained_model(forms.MINI)
    processor.image_mean = [0.5, 0.5, 0.5]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert list(load(tmp_path).image_processor.image_mean) == [0.5, 0.5, 0.5]


def test_the_towers_own_processor_is_the_next_best(tmp_path):
    clip = forms.clip(tmp_path / "clip")
    facts = json.loads((clip / "preprocessor_config.json").read_text())
    (clip / "preprocessor_config.json").write_text(json.dumps({**facts, "image_std": [1.0, 1.0, 1.0]}))
    assert list(load(forms.full(tmp_path / "x", tower=str(clip))).image_processor.image_std) == [1.0, 1.0, 1.0]


def test_processor_nested_in_the_whole_processors_settings(tmp_path):
    folder = forms.hugging_face(tmp_path / "x", "old")
    (folder / "preprocessor_config.json").unlink()
    facts = json.loads((forms.MINI / "processor_config.json").read_text())
    facts["image_processor"]["image_std"] = [1.0, 1.0, 1.0]
    (folder / "processor_config.json").write_text(json.dumps(facts))
    assert list(load(folder).image_processor.image_std) == [1.0, 1.0, 1.0]


def test_tokens_added_and_embeddings_resized(tmp_path):
    tokenizer, model, *_ = load_pretrained_model(forms.MINI)
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.model.lm_head.weight.shape[0] == len(again.tokenizer) == 270


@pytest.mark.parametrize("projector_type", ["linear", "identity", "mlp3x_gelu"])
def test_projector_types_of_llava(tmp_path, projector_type):
    hidden = {"linear": 128, "identity": 192, "mlp3x_gelu": 128}[projector_type]
    torch.manual_seed(0)
    config = forms.original_config(mm_projector_type=projector_type, hidden_size=hidden, num_hidden_layers=1)
    config["mm_vision_config"] = forms.config_of("vision_config")
    model = LlavaLlamaForCausalLM(LlavaConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    model.save_pretrained(tmp_path)
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert again.encode_images(torch.zeros(1, 3, 336, 336)).shape == (1, 576, hidden)


def test_tied_head_may_be_left_out(tmp_path):
    text = dict(forms.weights()["text"])
    del text["lm_head.weight"]
    folder = forms.full(tmp_path / "x", tie_word_embeddings=True)
    forms.write_shards(folder, text | forms.weights()["projector"], "bin")
    model = load(folder).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_buffers_of_older_releases_are_no_weights(check, tmp_path):
    folder = forms.full(tmp_path / "x", inside=True)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    old["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(577)[None]
    forms.write_shards(folder, forms.original_state(inside=True) | old, "bin")
    check(folder)


def test_training_starts_a_new_projector_and_says_so(tmp_path, caplog):
    vicuna, clip = forms.vicuna(tmp_path / "vicuna"), forms.clip(tmp_path / "clip")
    with caplog.at_level(logging.WARNING):
        arguments = ModelArguments(str(vicuna), vision_tower=str(clip)), TrainingArguments(str(tmp_path), use_cpu=True)
        _, model, _ = load_model(*arguments)
    assert "the projector begins with random weights" in caplog.text
    own = forms.weights()["tower"]["vision_model.embeddings.class_embedding"].float()
    assert torch.equal(model.get_vision_tower().vision_tower.embeddings.class_embedding, own)


def test_sampling_settings_that_vicuna_ships_do_not_stop_saving(tmp_path):
    folder = forms.full(tmp_path / "x")
    (folder / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1}')
    model = load(folder).model
    model.save_pretrained(tmp_path / "saved")
    assert model.generation_config.top_p == 0.6


def in_hub_cache(cache: Path, name: str, folder: Path) -> str:
    """A folder as the hub's cache holds it."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    return name


def test_checkpoint_and_tower_by_hub_id(check, tmp_path):
    clip = in_hub_cache(tmp_path / "cache", "somebody/clip", forms.clip(tmp_path / "clip"))
    full = in_hub_cache(tmp_path / "cache", "somebody/llava", forms.full(tmp_path / "x", tower=clip))
    loaded = check(full, cache_dir=tmp_path / "cache")
    assert loaded.model.name_or_path == full
    with pytest.raises(ValueError, match="mm_vision_tower is 'somebody/clip': no CLIP folder or reachable hub model"):
        load(tmp_path / "x")


def test_transformers_own_loader_gives_our_class(tmp_path):
    load(forms.MINI).model.save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert type(model) is LlavaLlamaForCausalLM and not info["missing_keys"]
    for name in ("subfolder", "variant", "ignore_mismatched_sizes"):
        with pytest.raises(ValueError, match=f"{name}: not taken here"):
            LlavaLlamaForCausalLM.from_pretrained(tmp_path, **{name: "x"})


def test_configurations_as_they_are_published():
    """The fields, in full, of what people download most."""
    own = {
        "_name_or_path": "llava-v1.5-7b",
        "architectures": ["LlavaLlamaForCausalLM"],
        "image_grid_pinpoints": None,
        "max_length": 4096,
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_vision_tower": HUB_NAME,
        "model_type": "llava",
        "rope_scaling": None,
        "torch_dtype": "float16",
        "tune_mm_vision_resampler": False,
        "freeze_mm_vision_resampler": False,
        "vocab_size": 32000,
    }
    config = translate({**forms.MM_FIELDS, **own}, "llava-v1.5-7b", LlavaConfig)
    assert (config.hidden_size, config.mm_vision_tower, config.dtype) == (4096, HUB_NAME, torch.float16)
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14}
    vision |= {"intermediate_size": 4096, "num_attention_heads": 16, "image_size": 336, "vocab_size": 32000}
    theirs = {"architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000}
    theirs |= {"model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu", "text_config": text}
    theirs |= {"torch_dtype": "float16", "vision_config": vision, "vision_feature_layer": -2, "vocab_size": 32064}
    config = translate({**theirs, "vision_feature_select_strategy": "default"}, "llava-1.5-7b-hf", LlavaConfig)
    assert (config.vocab_size, config.mm_hidden_size, config.mm_vision_select_layer) == (32064, 1024, -2)
    first = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14", "mm_hidden_size": 1024}
    assert translate({**first, "hidden_size": 4096}, "llava-7b-v1", LlavaConfig).mm_projector_type == "linear"


def test_the_table_in_the_docs_names_tests_that_exist():
    root = Path(__file__).parent
    text = (root.parent / "docs" / "checkpoints.md").read_text()
    named = re.findall(r"`(test_\w+)`", text)
    there = {name for path in root.glob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert len(named) > 20 and not set(named) - there
