"""LoRA adapters, as LLaVA's finetune_lora.sh and plain PEFT save them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from llava.model.checkpoint.files import first_line, read_json, read_weights
from llava.model.checkpoint.names import listed, ours, translated

ADAPTER_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PARTS = "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
_MATRIX = re.compile(rf"(?P<module>.+)\.(?P<part>{_PARTS})(?:\.default)?(?P<rest>\.weight)?")


def adapter_weights(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What an adapter's file holds: weights that take the place of the model's, and LoRA matrices; under our names.

    Raises
    ------
    ValueError
        If there is no such file, it is damaged, or the adapter is no LoRA.
    """
    kind = read_json(folder / ADAPTER_CONFIG).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder / ADAPTER_CONFIG}: peft_type is {kind!r}, only 'LORA' is supported")
    files = [folder / name for name in _FILES if (folder / name).exists()]
    if not files:
        raise ValueError(f"{folder}: has {ADAPTER_CONFIG} but no {' or '.join(_FILES)}")
    if len(files) > 1:
        raise ValueError(f"{folder}: holds {' and '.join(_FILES)}; move one of them away")
    matrices, whole = {}, {}
    for name, value in read_weights(files[0], mmap=False).items():
        if match := _MATRIX.fullmatch(name):
            matrices[f"{ours(match['module'])}.{match['part']}{match['rest'] or ''}"] = value[...]
        else:
            whole[name.replace(".modules_to_save.", ".")] = value
    if not matrices:
        raise ValueError(f"{files[0]}: holds no LoRA weights")
    return translated(whole, files[0].name), matrices


def merge_adapter(model: torch.nn.Module, folder: Path, matrices: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Merge LoRA matrices into a model, which is changed in place.

    Every module that the adapter's file names is wrapped, and no other: the settings' own patterns (`q_proj`) would
    reach into the vision tower, or miss modules that Hugging Face calls by another name.

    Raises
    ------
    ValueError
        If PEFT is not installed, or a matrix has no module or another shape.
    """
    try:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    except ImportError:
        raise ValueError(f"{folder}: LoRA weights need PEFT; pip install peft") from None
    modules = {_MATRIX.fullmatch(name)["module"] for name in matrices}
    if absent := modules - {name for name, _ in model.named_modules()}:
        raise ValueError(f"{folder}: adapts {len(absent)} modules that the model does not have ({listed(absent)})")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.target_modules, config.modules_to_save = sorted(modules), None
        config.base_model_name_or_path = None  # the base is what `model` is
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        for field in ("rank_pattern", "alpha_pattern"):
            setattr(config, field, {ours(name): value for name, value in (getattr(config, field) or {}).items()})
        wrapped = get_peft_model(model, config)
        named = {f"base_model.model.{name}": value for name, value in matrices.items()}
        result = set_peft_model_state_dict(wrapped, named)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}: the adapter does not fit the model ({first_line(error)})") from None
    lacking = [name for name in result.missing_keys if "lora_" in name]
    if lacking or result.unexpected_keys:
        raise ValueError(
            f"{folder}: the adapter does not fit its settings ({listed([*lacking, *result.unexpected_keys])})"
        )
    return wrapped.merge_and_unload()
