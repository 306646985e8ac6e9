"""The embedded model in every form that people have LLaVA checkpoints in; weights get their names here anew."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MINI = Path(__file__).resolve().parent.parent / "checkpoints" / "llava-mini"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
TEXT_FIELDS = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
MM_FIELDS = {
    "mm_hidden_size": 192,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_patch_merge_type": "flat",
    "image_aspect_ratio": "pad",
    "tune_mm_mlp_adapter": False,
    "freeze_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": False,
    "use_mm_proj": True,
    "pretraining_tp": 1,
}


@cache
def weights() -> dict[str, dict[str, torch.Tensor]]:
    """The parts "text", "projector" and "tower", under original LLaVA's, LLaVA's and CLIP's own names."""
    parts = {"text": {}, "projector": {}, "tower": {}}
    for name, value in load_file(MINI / "model.safetensors").items():
        if name.startswith("language_model."):
            parts["text"][name.removeprefix("language_model.")] = value
        elif name.startswith("multi_modal_projector.linear_"):
            number, kind = name.removeprefix("multi_modal_projector.linear_").split(".")
            parts["projector"][f"model.mm_projector.{2 * (int(number) - 1)}.{kind}"] = value
        else:
            parts["tower"]["vision_model." + name.removeprefix("vision_tower.")] = value
    return parts


def config_of(part: str) -> dict:
    return json.loads((MINI / "config.json").read_text())[part]


def original_config(**changes) -> dict:
    """What config.json of an original checkpoint says; None leaves a field out."""
    facts = {**config_of("text_config"), **TEXT_FIELDS, **MM_FIELDS, **changes}
    return {name: value for name, value in facts.items() if value is not None}


def write_config(folder: Path, **facts) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def add_tokenizer(folder: Path) -> None:
    for name in TOKENIZER:
        shutil.copy(MINI / name, folder)


def write_shards(folder: Path, state: dict[str, torch.Tensor], suffix: str, shards: int = 2) -> None:
    """Weights in several files with their index, pickled (`bin`) or not (`safetensors`)."""
    stem = {"bin": "pytorch_model", "safetensors": "model"}[suffix]
    names, index = sorted(state), {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        own = {name: state[name].contiguous() for name in names[number::shards]}
        index |= dict.fromkeys(own, file)
        torch.save(own, folder / file) if suffix == "bin" else save_file(own, folder / file)
    facts = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(facts))


def tower_inside() -> dict[str, torch.Tensor]:
    return {f"model.vision_tower.vision_tower.{name}": value for name, value in weights()["tower"].items()}


def original_state(inside: bool = False) -> dict[str, torch.Tensor]:
    return weights()["text"] | weights()["projector"] | (tower_inside() if inside else {})


def clip(folder: Path, processor: bool = True, **changes) -> Path:
    """The tower as a CLIP folder of its own."""
    write_config(folder, **{**config_of("vision_config"), **changes})
    save_file(weights()["tower"], folder / "model.safetensors")
    if processor:
        shutil.copy(MINI / "preprocessor_config.json", folder)
    return folder


def vicuna(folder: Path) -> Path:
    """The language model alone."""
    write_config(folder, **{**config_of("text_config"), "architectures": ["LlamaForCausalLM"]})
    torch.save(weights()["text"], folder / "pytorch_model.bin")
    add_tokenizer(folder)
    return folder


def full(folder: Path, inside: bool = False, suffix: str = "bin", beside: bool = True, tower=None, **changes) -> Path:
    """The original format as llava-v1.5-7b ships it, with the first stage's projector beside the weights."""
    named = str(clip(folder.parent / "clip")) if tower is None else tower
    write_config(folder, **original_config(mm_vision_tower=named, **changes))
    write_shards(folder, original_state(inside), suffix)
    if beside:
        noise = {name: torch.randn_like(value) for name, value in weights()["projector"].items()}
        torch.save(noise, folder / "mm_projector.bin")
    add_tokenizer(folder)
    return folder


def projector_only(folder: Path, **changes) -> Path:
    """What pretrain.sh writes."""
    write_config(folder, **original_config(mm_vision_tower=str(clip(folder.parent / "clip")), **changes))
    torch.save(weights()["projector"], folder / "mm_projector.bin")
    return folder


def lora_weights(scale: float = 0.5) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """LoRA matrices of all query projections, under LLaVA's module names, and what they add to the weights."""
    generator = torch.Generator().manual_seed(1)
    matrices, added = {}, {}
    for name, value in weights()["text"].items():
        if "q_proj" in name:
            a, b = (torch.randn(*shape, generator=generator) * 0.05 for shape in ((4, value.shape[1]), (len(value), 4)))
            module = name.removesuffix(".weight")
            matrices |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            added[name] = scale * b @ a
    return matrices, added


def add_adapter(
    folder: Path, base: str | None, matrices: dict[str, torch.Tensor], suffix: str = "bin", **changes
) -> None:
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": 4,
        "lora_alpha": 2,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": ["q_proj"],
        "inference_mode": True,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    state = {f"base_model.model.{name}": value for name, value in matrices.items()}
    if suffix == "bin":
        torch.save(state, folder / "adapter_model.bin")
    else:
        save_file(state, folder / "adapter_model.safetensors")


def without_lora(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that become the embedded model's when the adapter of `lora_weights` is merged."""
    _, added = lora_weights()
    return {name: value.float() - added[name] if name in added else value for name, value in state.items()}


def lora(folder: Path, base: Path, **changes) -> Path:
    """What finetune_lora.sh writes on `base`, a language model from which the adapter's matrices were taken away."""
    vicuna(base)
    torch.save(without_lora(weights()["text"]), base / "pytorch_model.bin")
    write_config(folder, **original_config(mm_vision_tower=str(clip(folder.parent / "clip")), **changes))
    add_adapter(folder, str(base), lora_weights()[0])
    extra = {f"base_model.model.{name}": value for name, value in weights()["projector"].items()}
    torch.save(extra, folder / "non_lora_trainables.bin")
    return folder


def hugging_face(folder: Path, generation: str, suffix: str = "safetensors", words: dict | None = None) -> Path:
    """Hugging Face's format under the names of weights of three generations of transformers."""
    prefixes = {
        "old": ("language_model.", "language_model.", "vision_tower.", "multi_modal_projector."),
        "new": ("model.language_model.", "", "model.vision_tower.", "model.multi_modal_projector."),
        "newest": ("language_model.", "language_model.", "vision_tower.", "multi_modal_projector."),
    }
    text, head, tower, projector = prefixes[generation]
    state = {}
    for name, value in (words or weights()["text"]).items():
        inner = name if generation != "new" else name.removeprefix("model.")
        state[(head if name.startswith("lm_head") else text) + inner] = value
    for name, value in weights()["tower"].items():
        state[tower + (name if generation != "newest" else name.removeprefix("vision_model."))] = value
    for name, value in weights()["projector"].items():
        state[f"{projector}linear_{1 if '.0.' in name else 2}.{name.rsplit('.', 1)[1]}"] = value
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(MINI / "config.json", folder)
    shutil.copy(MINI / "preprocessor_config.json", folder)
    add_tokenizer(folder)
    write_shards(folder, state, suffix)
    return folder
