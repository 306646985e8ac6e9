"""What cannot be loaded right is refused in one line that names it, before any weight is loaded."""

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import forms
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The forms that most cases start from, made once."""
    root = tmp_path_factory.mktemp("forms")
    forms.vicuna(root / "vicuna")
    forms.full(root / "full", inside=True, suffix="safetensors", beside=False)
    forms.full(root / "pickled", beside=False)
    forms.hugging_face(root / "hf", "old")
    forms.projector_only(root / "projector")
    forms.lora(root / "lora", root / "lora-base")
    return root


@pytest.fixture
def case(made, tmp_path):
    """A function that gives a copy of one of the forms, its files linked."""

    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for path in (made / name).iterdir():
            (folder / path.name).symlink_to(path)
        return folder

    return copy


def rewrite(path: Path, content: bytes | str | dict) -> None:
    """Put something else where a link is."""
    path.unlink(missing_ok=True)
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def change_config(folder: Path, part: str | None = None, **changes) -> None:
    facts = json.loads((folder / "config.json").read_text())
    (facts if part is None else facts[part]).update(changes)
    rewrite(folder / "config.json", facts)


def change_weights(folder: Path, change) -> None:
    """Change the weights of sharded safetensors, kept in one file from then on."""
    state = {name: value for shard in folder.glob("model-*") for name, value in load_file(shard).items()}
    for path in folder.glob("model*"):
        path.unlink()
    change(state)
    save_file(state, folder / "model.safetensors")


def refused(path, *arguments, match: str, kind=ValueError, **settings) -> None:
    with pytest.raises(kind, match=match) as error:
        load_pretrained_model(path, *arguments, **settings)
    assert "\n" not in str(error.value)


FIELDS = {
    "mm_patch_merge_type": ("spatial_maxpool2x2", "slice_2_2", "unpad", 3),
    "mm_resampler_type": ("perceiver", "qformer"),
    "mm_projector_type": ("mlp2x_res2x_gelu", "pooler", ""),
    "mm_vision_select_feature": ("slicefour_patch", "cls", None),
    "mm_vision_select_layer": ([-2, -3], "-2", 9, True, None),
    "mm_hidden_size": (1024, "192"),
    "mm_use_im_start_end": ("yes",),
    "mm_spatial_pool_stride": (2,),
    "mm_something_new": (True, "x"),
    "s2": (True,),
    "use_mm_proj": (False,),
    "image_aspect_ratio": ("anyres", "anyres_max_9", "highres"),
    "image_grid_pinpoints": ([[112, 100]], "(1x1),(2x2)", [112, 224], [], [[0, 112]]),
    "sliding_window": (4096,),
    "rope_scaling": ({"type": "foo", "factor": 2.0}, 3),
    "hidden_act": ("foo",),
    "hidden_size": ("wide", -4, None),
    "num_hidden_layers": (0, 10**9),
    "rms_norm_eps": (-1.0, 3.0),
    "rope_theta": ("x", 0),
    "num_attention_heads": (0, "four"),
    "num_key_value_heads": (3,),
    "vocab_size": ("many", 0),
    "tokenizer_padding_side": ("middle",),
    "tokenizer_model_max_length": ("long",),
    "tie_word_embeddings": ("no",),
    "quantization_config": (
        {"quant_method": "gptq", "bits": 4},
        "nf4",
        {"load_in_4bit": False},
        {"load_in_4bit": True},
    ),
    "architectures": (["LlavaMistralForCausalLM"], "LlavaLlamaForCausalLM"),
    "model_type": ("llava_mistral", "llava_qwen", "llava_next", "llava_onevision", "video_llava", "mllama", None, 7),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_field_that_is_not_computed_here(case, field, value):
    folder = case("full")
    if field in ("rope_scaling", "rope_theta"):
        facts = json.loads((folder / "config.json").read_text())
        del facts["rope_parameters"]
        rewrite(folder / "config.json", facts)
    change_config(folder, **{field: value})
    if field == "image_grid_pinpoints":
        change_config(folder, image_aspect_ratio="anyres")
    shown = "rope_parameters|rope_scaling" if field == "rope_scaling" else field
    refused(folder, match=f"({shown}).*|{field}")


HUGGING_FACE_FIELDS = [
    (None, "projector_hidden_act", "relu"),
    (None, "multimodal_projector_bias", False),
    (None, "vision_feature_layer", [-2, -3]),
    (None, "vision_feature_layer", 9),
    (None, "vision_feature_select_strategy", "cls"),
    (None, "text_config", 3),
    ("text_config", "model_type", "gemma"),
    ("text_config", "sliding_window", 64),
    ("text_config", "hidden_size", "wide"),
    ("vision_config", "model_type", "pixtral"),
    ("vision_config", "patch_size", 0),
    ("vision_config", "num_attention_heads", 7),
    ("vision_config", "num_attention_heads", 0),
    ("vision_config", "image_size", [336]),
    ("vision_config", "num_hidden_layers", 10**9),
    (None, "vision_feature_select_strategy", []),
    (None, "dtype", [1]),
]


@pytest.mark.parametrize(("part", "field", "value"), HUGGING_FACE_FIELDS)
def test_field_of_hugging_face_that_is_not_computed_here(case, part, field, value):
    folder = case("hf")
    change_config(folder, part, **{field: value})
    shown = {"vision_feature_layer": "vision_(feature|select)_layer", "num_attention_heads": "attention heads|modulo"}
    shown["dtype"] = "config.json: no LlavaConfig"
    refused(folder, match=shown.get(field, field))


def test_harmless_fields_of_llava_pass(case):
    folder = case("full")
    harmless = {"mm_projector_lr": 2e-5, "tune_mm_vision_resampler": False, "pretraining_tp": 2, "s2": False}
    harmless |= {"s2_scales": "336,672", "mm_resampler_type": None, "image_seq_length": 576, "delay_load": True}
    change_config(folder, **harmless, image_crop_resolution=224, mm_tunable_parts="mm_mlp_adapter")
    assert load_pretrained_model(folder)[1].get_vision_tower() is not None


@pytest.mark.parametrize(
    "name",
    ["model.mm_projector.2.bias", "lm_head.weight", "model.layers.7.mlp.up_proj.weight", "model.norm.weight", "tower"],
)
def test_missing_weight_of_the_original_format_is_named(case, name):
    folder = case("full")
    name = name if name != "tower" else "model.vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias"
    change_weights(folder, lambda state: state.pop(name))
    refused(folder, match=f"1 weights are missing .*{name.replace('vision_model.', '')}")


@pytest.mark.parametrize(
    "name",
    ["multi_modal_projector.linear_1.weight", "language_model.lm_head.weight", "vision_tower.vision_model.encoder"],
)
def test_missing_weight_of_hugging_faces_format_is_named(case, name):
    folder = case("hf")
    gone: list[str] = []

    def drop(state: dict) -> None:
        gone.extend(key for key in state if key.startswith(name))
        for key in gone:
            del state[key]

    change_weights(folder, drop)
    shown = name if "projector" in name else name.split(".")[-1]
    refused(folder, match=f"{len(gone)} weights are missing .*{shown}")


def test_the_whole_projector_missing(case):
    change_weights(folder := case("full"), lambda s: [s.pop(name) for name in list(s) if "mm_projector" in name])
    refused(folder, match=r"4 weights are missing .*model\.mm_projector\.0\.bias")
    refused(case("vicuna"), case("projector"), match="model_base.*holds complete weights")


@pytest.mark.parametrize(
    "name",
    ["model.image_newline", "model.vision_resampler.query", "model.layers.16.mlp.up_proj.weight", "model.x"],
)
def test_weight_without_a_place_is_named(case, name):
    change_weights(folder := case("full"), lambda state: state.update({name: torch.ones(3)}))
    refused(folder, match=f"1 weights have no place in the model of config.json .*{name}")


def test_weight_of_another_shape_is_named(case):
    change_weights(folder := case("full"), lambda state: state.update({"model.mm_projector.2.bias": torch.ones(64)}))
    refused(folder, match=r"model\.mm_projector\.2\.bias has the shape \[64\], config\.json says \[128\]")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_packed_weights_and_config_that_disagree(made, tmp_path):
    tokenizer, model, *_ = load_pretrained_model(made / "full", load_8bit=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    facts, state = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    name = "model.layers.3.mlp.up_proj"
    save_file({key: value for key, value in state.items() if key != f"{name}.SCB"}, tmp_path / "model.safetensors")
    refused(tmp_path, match=rf"{name}\.weight is packed, but {name}\.SCB is missing")
    save_file(state, tmp_path / "model.safetensors")
    other = facts["quantization_config"] | {"load_in_4bit": True, "load_in_8bit": False}
    (tmp_path / "config.json").write_text(json.dumps(facts | {"quantization_config": other}))
    refused(tmp_path, match=r"is packed, but .*\.weight\.absmax is missing")
    del facts["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(facts))
    refused(tmp_path, match="224 weights have no place")


def test_two_names_for_one_weight(case):
    change_weights(folder := case("full"), lambda s: s.update({"mm_projector.2.bias": torch.ones(128)}))
    refused(folder, match=r"holds model\.mm_projector\.2\.bias twice")


@pytest.mark.parametrize("stands_in", ["lfs", "empty", "truncated", "text", "folder"])
@pytest.mark.parametrize("form", ["full", "pickled", "projector", "lora"])
def test_damaged_file_of_weights_is_named(case, made, form, stands_in):
    folder, name = case(form), {"projector": "mm_projector.bin", "lora": "adapter_model.bin"}.get(form)
    path = folder / name if name else sorted(folder.glob("*-00002-of-00002.*"))[0]
    content = {
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "empty": b"",
        "truncated": path.read_bytes()[:-1000],
        "text": b"no weights at all",
        "folder": b"",
    }[stands_in]
    rewrite(path, content)
    if stands_in == "folder":
        path.unlink()
        path.mkdir()
    shown = {"lfs": "git-lfs pointer.*git lfs pull", "empty": "is empty", "folder": "is a folder"}.get(stands_in)
    base = [made / "vicuna"] if name else []
    refused(folder, *base, match=f"{path.name}.*{shown or 'damaged, or no file of weights'}")


MUST_NOT_BE = Path(tempfile.gettempdir()) / "must-not-be-there"


class Malicious:
    def __reduce__(self):
        return (Path.touch, (MUST_NOT_BE,))


@pytest.mark.parametrize("content", [Malicious(), [1, 2], {"a": 3}], ids=["code", "list", "numbers"])
def test_pickle_with_anything_but_tensors_is_never_executed(case, made, content):
    folder = case("projector")
    (folder / "mm_projector.bin").unlink()
    torch.save(content, folder / "mm_projector.bin")
    refused(folder, made / "vicuna", match="mm_projector.bin: (damaged|holds something else)")
    assert not MUST_NOT_BE.exists()


def test_index_and_shards_that_disagree(case):
    folder = case("full")
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, match=r"1 of the 2 weight files that model\.safetensors\.index\.json names are missing .*00002")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, match="1 of the 2 weight files that their names count are missing")
    for wrong in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../other.safetensors"}}'):
        rewrite(folder / "model.safetensors.index.json", wrong)
        refused(folder, match=r"model\.safetensors\.index\.json")


def test_two_sets_of_weights_that_differ(case):
    folder = case("full")
    state = forms.original_state(inside=True)
    torch.save(state | {"lm_head.weight": state["lm_head.weight"] + 1}, folder / "pytorch_model.bin")
    refused(folder, match="holds two sets of weights that differ, model-.* and pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    save_file(forms.weights()["text"], folder / "model.safetensors")
    refused(folder, match="holds two sets of weights that differ, model.safetensors and model-")


@pytest.mark.parametrize("content", ["{", "[]", "3", "", b"\xff\xfe", "[" * 3000, '{"a": NaN}'])
def test_config_that_is_no_json_object(case, content):
    rewrite((folder := case("full")) / "config.json", content)
    refused(folder, match=r"config\.json: (cannot be read as JSON|holds a JSON)")


def test_fields_of_both_formats(case):
    change_config(folder := case("hf"), mm_vision_tower="clip")
    refused(folder, match="text_config of Hugging Face's format and mm_vision_tower of the original")


def test_no_config(case, made):
    (folder := case("full") / "config.json").unlink()
    refused(folder.parent, match="holds weights but no config.json")
    (folder := case("projector") / "config.json").unlink()
    refused(folder.parent, made / "vicuna", match="weights have no place in the model of config.json .*mm_projector")


def test_folders_without_weights(tmp_path, case):
    refused(tmp_path, match="neither a folder with a config.json nor weights|empty folder")
    refused(tmp_path / "nowhere", match="model_path is '.*nowhere': neither a folder")
    refused("no-such/hub-model", match="model_path is 'no-such/hub-model': neither a folder")
    refused("two words/x", match="model_path is 'two words/x'")
    for nothing in (None, "", 3):
        refused(nothing, match=f"model_path: got {nothing!r}, expected a folder or a hub id")
    refused(forms.MINI / "config.json", match="a file, it must be the folder of a checkpoint")
    forms.write_config(tmp_path / "x", **forms.original_config())
    refused(tmp_path / "x", match="holds no weights, expected")
    (tmp_path / "x" / "llava.gguf").write_text("x")
    refused(tmp_path / "x", match=r"holds no weights that can be read \(llava.gguf\)")
    (tmp_path / "x" / "checkpoint-100").mkdir()
    refused(tmp_path / "x", match=r"holds only training checkpoints \(checkpoint-100\)")
    (tmp_path / "x" / "global_step100").mkdir()
    refused(tmp_path / "x", match=r"only DeepSpeed's own shards \(global_step100\).*zero_to_fp32")


def test_partial_folders_without_their_base(case, made, tmp_path):
    refused(case("projector"), match="model_base: .*holds only a projector, name the language model")
    folder = case("lora")
    settings = json.loads((folder / "adapter_config.json").read_text())
    rewrite(folder / "adapter_config.json", settings | {"base_model_name_or_path": None})
    refused(folder, match="model_base: .*holds only LoRA weights, name the language model")
    rewrite(folder / "adapter_config.json", settings | {"base_model_name_or_path": "no/such-base"})
    refused(folder, match="model_base is 'no/such-base'")
    refused(folder, tmp_path / "nowhere", match="model_base is '.*nowhere'")
    refused(folder, made / "projector", match="model_base is .*holds only a projector itself")
    with pytest.raises(ValueError, match="model_base"):
        LlavaLlamaForCausalLM.from_pretrained(made / "projector")


def test_lora_that_does_not_fit(case, made):
    folder = case("lora")
    (folder / "non_lora_trainables.bin").unlink()
    refused(folder, match=r"4 weights are missing .*model\.mm_projector\.0\.bias")
    rewrite(folder / "adapter_model.bin", b"")
    (folder / "adapter_model.bin").unlink()
    refused(folder, match="has adapter_config.json but no adapter_model.safetensors or adapter_model.bin")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING', only 'LORA'"),
        ({"r": 8}, "the adapter does not fit the model"),
        ({"r": "eight"}, "the adapter does not fit"),
    ],
)
def test_adapter_settings_that_do_not_fit(case, change, match):
    folder = case("lora")
    rewrite(folder / "adapter_config.json", json.loads((folder / "adapter_config.json").read_text()) | change)
    refused(folder, match=match)


@pytest.mark.parametrize(
    ("drop", "add", "match"),
    [
        ("layers.3.self_attn.q_proj.lora_B.weight", None, "does not fit its settings .*layers.3.*lora_B"),
        (None, "model.layers.99.self_attn.q_proj.lora_A.weight", "adapts 1 modules that the model does not have"),
        (None, "model.layers.0.self_attn.q_proj.oft_R.weight", "weights have no place in the model"),
    ],
)
def test_adapter_with_missing_or_foreign_matrices(case, drop, add, match):
    folder = case("lora")
    state = torch.load(folder / "adapter_model.bin", weights_only=True)
    state = {name: value for name, value in state.items() if drop is None or drop not in name}
    if add:
        state[f"base_model.model.{add}"] = torch.ones(4, 128)
    (folder / "adapter_model.bin").unlink()
    torch.save(state, folder / "adapter_model.bin")
    refused(folder, match=match)


def test_two_things_in_one_folder(case, made):
    folder = case("full")
    (folder / "adapter_config.json").symlink_to(made / "lora" / "adapter_config.json")
    refused(folder, match="holds complete weights and an adapter")
    refused(case("pickled"), made / "vicuna", match="model_base .*holds complete weights and needs no base")


def test_towers_that_are_none(case, tmp_path):
    folder = case("pickled")
    for tower, match in (
        ("no/such-clip", "mm_vision_tower is 'no/such-clip'"),
        (str(tmp_path / "nowhere"), "mm_vision_tower is '.*nowhere'"),
        (str(forms.write_config(tmp_path / "siglip", model_type="siglip")), "its model_type is 'siglip', only CLIP"),
        (str(forms.write_config(tmp_path / "bare", **forms.config_of("vision_config"))), "holds no weights of a CLIP"),
        (str(forms.clip(tmp_path / "wide", hidden_size=384)), "mm_hidden_size is 192: .* width is 384"),
        (str(forms.clip(tmp_path / "shallow", num_hidden_layers=5)), "have no place .*encoder.layers.5"),
        (str(forms.clip(tmp_path / "deep", num_hidden_layers=7)), "16 weights are missing .*encoder.layers.6"),
    ):
        change_config(folder, mm_vision_tower=tower)
        refused(folder, match=match)


def test_tokenizers_that_do_not_fit(case, tmp_path):
    folder = case("full")
    change_config(folder, mm_use_im_start_end=True)
    refused(folder, match=r"tokenizer: has tokens up to 270 \('<im_end>'\), but vocab_size is 269")
    change_config(folder, mm_use_im_start_end=False)
    tokenizer = load_pretrained_model(forms.MINI)[0]
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(tmp_path / "more")
    rewrite(folder / "tokenizer.json", (tmp_path / "more" / "tokenizer.json").read_bytes())
    refused(folder, match=r"tokenizer: has tokens up to 270 \('<two>'\).*embeddings were not resized")
    rewrite(folder / "tokenizer.json", "{")
    refused(folder, match="tokenizer: none can be loaded from")
    (folder / "tokenizer.json").unlink()
    refused(folder, match="tokenizer: none can be loaded from")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "preprocessor_config.json: cannot be read as JSON"),
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type is 'SiglipImageProcessor'"),
        ({"crop_size": {"height": 224, "width": 224}, "size": 224}, "crop_size is 224 x 224, .* takes 336 x 336"),
        ({"crop_size": "large"}, "preprocessor_config.json: "),
    ],
)
def test_image_processor_that_does_not_fit(case, content, match):
    rewrite((folder := case("hf")) / "preprocessor_config.json", content)
    refused(folder, match=match)


ARGUMENTS = [
    ({"load_in_4bit": True}, TypeError, "unexpected keyword argument 'load_in_4bit'"),
    ({"tourch_dtype": "float16"}, TypeError, "unexpected keyword argument 'tourch_dtype'"),
    ({"load_4bit": True, "load_8bit": True}, ValueError, "load_8bit, load_4bit.*at most one"),
    ({"torch_dtype": "float61"}, ValueError, "torch_dtype: got 'float61'"),
    ({"torch_dtype": torch.int8}, ValueError, "torch_dtype: got torch.int8"),
    ({"device": "gpu"}, ValueError, "device: got 'gpu'"),
    ({"device": "cuda:99"}, ValueError, "device: got 'cuda:99', but there are"),
    ({"device_map": "everywhere"}, ValueError, "device_map: got 'everywhere'"),
    ({"device_map": {"": "cuda:99"}}, ValueError, "device_map: got 'cuda:99'"),
    ({"quantization_config": {"load_in_4bit": True}}, ValueError, "quantization_config: got dict"),
    ({"attn_implementation": "fast"}, ValueError, "attn_implementation: got 'fast'"),
]


@pytest.mark.parametrize(("settings", "kind", "match"), ARGUMENTS, ids=str)
def test_argument_that_cannot_be_had(settings, kind, match):
    refused(forms.MINI, kind=kind, match=match, **settings)


def test_flash_attention_without_its_package():
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    refused(forms.MINI, match="use_flash_attn: flash-attn is not installed", use_flash_attn=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.float16", torch.bfloat16, "auto"])
def test_dtypes_by_name(dtype):
    model = load_pretrained_model(forms.MINI, torch_dtype=dtype, device_map="cpu", multimodal=True)[1]
    assert model.dtype == (torch.bfloat16 if "bfloat16" in str(dtype) else torch.float16)
