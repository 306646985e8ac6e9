"""Low-rank adapters of the language model, saved as LLaVA saves them.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` (PEFT's), and ``non_lora_trainables.bin`` with
everything else that was trained, the projector, under names that begin with ``base_model.model.``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel

    from llava.train.arguments import TrainingArguments

ADAPTER_FILE = "adapter_config.json"
NON_LORA_FILE = "non_lora_trainables.bin"
NOT_ADAPTED = ("mm_projector", "vision_tower", "lm_head")


def adapted_names(model: nn.Module) -> list[str]:
    """Last part of the names of all linear layers of the language model, its output layer left out."""
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return sorted({name.split(".")[-1] for name in linear if not set(name.split(".")) & set(NOT_ADAPTED)})


def add_lora(model: PreTrainedModel, args: TrainingArguments) -> PeftModel:
    """Wrap a model: its own weights are frozen, adapters of `lora_r` learn."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        target_modules=adapted_names(model),
        # PEFT matches by the end of a name, and the vision tower has projections of the same names.
        exclude_modules=rf".*\b({'|'.join(NOT_ADAPTED)})\b.*",
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def whole(parameter: Tensor) -> Tensor:
    """A parameter on the CPU, gathered from all processes if DeepSpeed ZeRO-3 has cut it up."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().cpu().clone()
    from deepspeed import zero

    with zero.GatheredParameters([parameter]):
        return parameter.data.detach().cpu().clone()


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights that learn, whole and on the CPU; every process has to call this."""
    return {name: whole(value) for name, value in model.named_parameters() if value.requires_grad}


def save_lora(model: PeftModel, folder: Path, is_main: bool) -> None:
    """Write adapters, the other trained weights and the configuration; every process has to call this."""
    weights = trained_weights(model)
    if not is_main:
        return
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    rest = {name: value for name, value in weights.items() if "lora_" not in name}
    torch.save(rest, folder / NON_LORA_FILE)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the base in this run; the adapters fit it whole as well
    config.save_pretrained(folder)


def load_lora(model: PeftModel, folder: str | Path) -> None:
    """Load what :func:`save_lora` wrote into a wrapped model.

    Raises
    ------
    ValueError
        If the folder holds other weights than this model trains.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    try:
        adapters = load_peft_weights(str(folder), device="cpu")
        file = Path(folder) / NON_LORA_FILE
        rest = torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else {}
        found = set_peft_model_state_dict(model, adapters)
        unknown = [*found.unexpected_keys, *model.load_state_dict(rest, strict=False).unexpected_keys]
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"LoRA weights: {folder} does not fit ({' '.join(str(error).split())[:300]})") from None
    wanted = {name for name, value in model.named_parameters() if value.requires_grad}
    needed = {name.replace(".default.", ".") for name in wanted if rest or "lora_" in name}
    missing = needed - set(adapters) - set(rest)
    if unknown or missing:
        raise ValueError(f"LoRA weights: {folder} lacks {sorted(missing)[:3]} and has unknown {sorted(unknown)[:3]}")
