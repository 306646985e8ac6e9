"""Command-line arguments of ``llava/train/train.py``, under LLaVA's names."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.deepspeed import is_deepspeed_available

from llava.conversation import conv_templates

log = logging.getLogger(__name__)

ASPECT_RATIOS = ("square", "pad", "anyres")
PROJECTORS = r"linear|identity|mlp[1-9]\d*x_gelu"
LORA_BIASES = ("none", "all", "lora_only")
QUANTISATIONS = ("nf4", "fp4")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")


@dataclass
class ModelArguments:
    """Which model, and which parts of it learn."""

    model_name_or_path: str = field(
        metadata={"help": "LLaVA checkpoint of either format, or a LLaMA language model together with --vision_tower"}
    )
    version: str = field(default="v1", metadata={"help": "prompt template: v1 for dialogues, plain for captions"})
    vision_tower: str | None = field(default=None, metadata={"help": "CLIP folder or hub id, for a base without one"})
    mm_projector_type: str | None = field(
        default=None, metadata={"help": "linear or mlp2x_gelu (default); for a new projector"}
    )
    mm_vision_select_layer: int | None = field(
        default=None, metadata={"help": "hidden state that gives the features; default: the checkpoint's, or -2"}
    )
    mm_vision_select_feature: str | None = field(
        default=None, metadata={"help": "patch (default) or cls_patch; a LLaVA checkpoint has its own"}
    )
    pretrain_mm_mlp_adapter: str | None = field(
        default=None, metadata={"help": "mm_projector.bin of the alignment stage"}
    )
    tune_mm_mlp_adapter: bool = field(default=False, metadata={"help": "train the projector alone (alignment stage)"})
    freeze_mm_mlp_adapter: bool = field(default=False, metadata={"help": "keep the projector as it is"})
    freeze_backbone: bool = field(default=False, metadata={"help": "keep the language model as it is"})
    mm_use_im_start_end: bool = field(
        default=False, metadata={"help": "put the tokens <im_start> and <im_end> around images"}
    )
    mm_use_im_patch_token: bool = field(default=False, metadata={"help": "add the token <im_patch>"})

    def check(self) -> None:
        """Raise ``ValueError`` with one line for what cannot work."""
        if self.version not in conv_templates:
            raise ValueError(f"version: {self.version!r} is unknown, expected one of {sorted(conv_templates)}")
        if self.mm_projector_type is not None and not re.fullmatch(PROJECTORS, self.mm_projector_type):
            raise ValueError(f"mm_projector_type: got {self.mm_projector_type!r}, expected linear or like mlp2x_gelu")
        if self.mm_vision_select_feature not in (None, "patch", "cls_patch"):
            raise ValueError(
                f"mm_vision_select_feature: got {self.mm_vision_select_feature!r}, expected patch or cls_patch"
            )
        if self.tune_mm_mlp_adapter and self.freeze_mm_mlp_adapter:
            raise ValueError("tune_mm_mlp_adapter and freeze_mm_mlp_adapter: both are set, at most one can be")
        if self.freeze_backbone and self.freeze_mm_mlp_adapter:
            raise ValueError("freeze_backbone and freeze_mm_mlp_adapter: nothing would be left to train")
        if self.mm_use_im_start_end and self.tune_mm_mlp_adapter:
            raise ValueError("mm_use_im_start_end: got True with tune_mm_mlp_adapter, expected False as in LLaVA")
        if self.mm_use_im_start_end and self.version == "plain":
            raise ValueError("mm_use_im_start_end: got True with version 'plain', which has no place for them")
        if self.pretrain_mm_mlp_adapter and not Path(self.pretrain_mm_mlp_adapter).is_file():
            raise ValueError(f"pretrain_mm_mlp_adapter: there is no file {self.pretrain_mm_mlp_adapter!r}")


@dataclass
class DataArguments:
    """What to learn from: LLaVA's JSON, or scenes drawn on the fly."""

    data_path: str | None = field(
        default=None, metadata={"help": "LLaVA JSON: a list with conversations and images; .jsonl: one a line"}
    )
    image_folder: str = field(default=".", metadata={"help": "folder that image names in the JSON are relative to"})
    image_aspect_ratio: str = field(default="pad", metadata={"help": f"one of {', '.join(ASPECT_RATIOS)}"})
    image_grid_pinpoints: str | None = field(
        default=None, metadata={"help": "resolutions for anyres, such as [[336, 672], [672, 336]]"}
    )
    mini_scenes: int = field(
        default=0, metadata={"help": "instead of data_path: so many questions about synthetic scenes"}
    )
    lazy_preprocess: bool = field(default=True, metadata={"help": "LLaVA's; examples are always made when asked for"})
    is_multimodal: bool = field(default=True, metadata={"help": "LLaVA's; the model always is"})

    def check(self) -> None:
        """Raise ``ValueError`` with one line for what cannot work."""
        if self.mini_scenes < 0 or (self.data_path is None) == (self.mini_scenes == 0):
            raise ValueError("data_path: give either data_path or a positive mini_scenes")
        if self.data_path is not None and not Path(self.data_path).is_file():
            raise ValueError(f"data_path: there is no file {self.data_path!r}")
        if self.data_path is not None and not Path(self.image_folder).is_dir():
            raise ValueError(f"image_folder: there is no folder {self.image_folder!r}")
        if self.image_aspect_ratio not in ASPECT_RATIOS:
            raise ValueError(
                f"image_aspect_ratio: {self.image_aspect_ratio!r} is not one of {', '.join(ASPECT_RATIOS)}"
            )
        if (self.image_aspect_ratio == "anyres") != (self.image_grid_pinpoints is not None):
            raise ValueError("image_grid_pinpoints: expected with image_aspect_ratio anyres, and only then")
        self.pinpoints()

    def pinpoints(self) -> list[list[int]] | None:
        """The resolutions for anyres, pairs of pixels."""
        if self.image_grid_pinpoints is None:
            return None
        try:
            pairs = json.loads(self.image_grid_pinpoints.replace("(", "[").replace(")", "]"))
            if pairs and all(isinstance(side, int) and side > 0 for width, height in pairs for side in (width, height)):
                return [list(pair) for pair in pairs]
        except (TypeError, ValueError):
            pass
        raise ValueError(f"image_grid_pinpoints: got {self.image_grid_pinpoints!r}, expected pairs of pixels")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' arguments, with the defaults that multimodal batches need, and those of LLaVA's own trainer."""

    model_max_length: int = field(
        default=2048, metadata={"help": "positions after which a conversation is cut, image tokens counted"}
    )
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "learning rate of the projector, if different"}
    )
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "batches of similar length, with or without images, as LLaVA's full tuning"}
    )
    lora_enable: bool = field(default=False, metadata={"help": "train low-rank adapters of the language model"})
    lora_r: int = field(default=64, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=16, metadata={"help": "scale of the adapters, times 1 / rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the adapters"})
    lora_bias: str = field(default="none", metadata={"help": f"one of {', '.join(LORA_BIASES)}"})
    lora_weight_path: str = field(default="", metadata={"help": "folder of LoRA weights to begin with"})
    bits: int = field(default=16, metadata={"help": "4 or 8 quantise the frozen language model; LoRA only"})
    double_quant: bool = field(default=True, metadata={"help": "with 4 bits: quantise the scales, too"})
    quant_type: str = field(default="nf4", metadata={"help": "with 4 bits: nf4 or fp4"})
    cache_dir: str | None = field(default=None, metadata={"help": "LLaVA's; set HF_HUB_CACHE instead"})
    mpt_attn_impl: str | None = field(default=None, metadata={"help": "LLaVA's; MPT models are not supported"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, flash_attention_2 or eager"})
    evaluation_strategy: str | None = field(default=None, metadata={"help": "old name of eval_strategy"})
    warmup_ratio: float | None = field(default=None, metadata={"help": "share of the steps with a rising rate"})
    remove_unused_columns: bool = False
    report_to: str = "none"

    def __post_init__(self):
        """Translate names and settings of older transformers, then check as transformers does."""
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.warmup_ratio is not None:
            if not 0 <= self.warmup_ratio < 1:
                raise ValueError(f"warmup_ratio: got {self.warmup_ratio}, expected a share from 0 to below 1")
            self.warmup_steps = self.warmup_steps or self.warmup_ratio  # below 1 transformers takes it for a share
        if self.tf32 and not torch.cuda.is_available():
            log.warning("tf32: left out, there is no CUDA device")
            self.tf32 = None
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else transformers refuses bfloat16, which CPUs can do
        _check_deepspeed_file(self.deepspeed)
        super().__post_init__()

    def check(self, model: ModelArguments) -> None:
        """Raise ``ValueError`` with one line for what cannot work, alone or with this model."""
        self._check_numbers()
        self._check_lora(model)
        self._check_libraries()
        self._check_deepspeed(whole=not (self.lora_enable or model.tune_mm_mlp_adapter))
        self._check_unread()
        if self.cache_dir is not None:
            raise ValueError(f"cache_dir: got {self.cache_dir!r}, expected the variable HF_HUB_CACHE instead")
        if self.mpt_attn_impl is not None:
            raise ValueError(f"mpt_attn_impl: got {self.mpt_attn_impl!r}, expected a LLaMA model: MPT is not supported")
        if self.fsdp:
            raise ValueError(f"fsdp: got {self.fsdp!r}, expected --deepspeed configs/deepspeed/zero3.json instead")
        if self.n_gpu > 1:
            raise ValueError(f"torchrun: one process got {self.n_gpu} GPUs, expected one each: use torchrun")
        output = Path(self.output_dir).absolute()
        there = next(folder for folder in (output, *output.parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"output_dir: got {self.output_dir!r}, expected a folder that can be written")

    def _check_unread(self) -> None:
        """Refuse what transformers offers and this trainer would pass over or get wrong."""
        if self.eval_strategy != "no":
            raise ValueError(f"eval_strategy: got {self.eval_strategy.value!r}, expected 'no': nothing is held out")
        for name in ("do_eval", "do_predict", "eval_on_start", "label_smoothing_factor"):
            if getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)}, expected {type(getattr(self, name))()} here")

    def _check_numbers(self) -> None:
        for name in (entry.name for entry in dataclasses.fields(self)):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: got {value}, expected a finite number")
        for name in ("model_max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "lora_r"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("lora_alpha", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a number above 0")
        if self.mm_projector_lr is not None and self.mm_projector_lr <= 0:
            raise ValueError(f"mm_projector_lr: got {self.mm_projector_lr}, expected a number above 0")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs: got {self.num_train_epochs}, expected a number above 0")

    def _check_lora(self, model: ModelArguments) -> None:
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout: got {self.lora_dropout}, expected a share from 0 to below 1")
        if self.lora_bias not in LORA_BIASES:
            raise ValueError(f"lora_bias: got {self.lora_bias!r}, expected one of {', '.join(LORA_BIASES)}")
        if self.bits not in (4, 8, 16):
            raise ValueError(f"bits: got {self.bits}, expected 4, 8 or 16")
        if self.quant_type not in QUANTISATIONS:
            raise ValueError(f"quant_type: got {self.quant_type!r}, expected one of {', '.join(QUANTISATIONS)}")
        if self.bits != 16 and not self.lora_enable:
            raise ValueError(f"bits: got {self.bits} without lora_enable, expected 16: quantised weights cannot learn")
        if self.lora_weight_path and not self.lora_enable:
            raise ValueError(f"lora_weight_path: got {self.lora_weight_path!r} without lora_enable, expected both")
        if self.lora_weight_path and not Path(self.lora_weight_path).is_dir():
            raise ValueError(f"lora_weight_path: there is no folder {self.lora_weight_path!r}")
        if self.lora_enable and model.tune_mm_mlp_adapter:
            raise ValueError("lora_enable and tune_mm_mlp_adapter: both are set, at most one can be")

    def _check_libraries(self) -> None:
        for name in self.report_to:
            if name not in get_available_reporting_integrations():
                raise ValueError(f"report_to: got {name!r}, which is not installed here; install it, or say none")
        if self.lora_enable and not transformers.utils.is_peft_available():
            raise ValueError("lora_enable: got True, expected the package peft to be installed")
        if self.bits != 16 and not transformers.utils.is_bitsandbytes_available():
            raise ValueError(f"bits: got {self.bits}, expected the package bitsandbytes to be installed")
        if self.bits != 16 and self.zero_stage == 3:
            raise ValueError(f"bits: got {self.bits} with DeepSpeed ZeRO-3, expected ZeRO-2 or 16 bits")
        if self.attn_implementation not in ATTENTIONS:
            raise ValueError(
                f"attn_implementation: got {self.attn_implementation!r}, expected one of {', '.join(ATTENTIONS)}"
            )
        if self.attn_implementation == "flash_attention_2" and not transformers.utils.is_flash_attn_2_available():
            raise ValueError("attn_implementation: got 'flash_attention_2', expected sdpa: flash-attn is not installed")

    def _check_deepspeed(self, whole: bool) -> None:
        if self.mm_projector_lr is not None and "scheduler" in self.deepspeed_settings:
            raise ValueError(
                "mm_projector_lr: the DeepSpeed file has a 'scheduler', which knows one rate only; leave it out there"
            )
        gather = "stage3_gather_16bit_weights_on_model_save"
        if whole and self.zero_stage == 3 and not self.deepspeed_settings["zero_optimization"].get(gather):
            raise ValueError(f"deepspeed: {gather} is not true, expected true: without it no weights are saved")

    @property
    def deepspeed_settings(self) -> dict:
        """Contents of the DeepSpeed file, empty without one."""
        plugin = getattr(self, "hf_deepspeed_config", None)
        return {} if plugin is None else plugin.config

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 without DeepSpeed."""
        return self.deepspeed_settings.get("zero_optimization", {}).get("stage", 0)


def _check_deepspeed_file(deepspeed: str | dict | None) -> None:
    if not isinstance(deepspeed, str) or deepspeed.startswith("{"):
        return
    if not transformers.utils.is_accelerate_available() or not is_deepspeed_available():
        raise ValueError(f"deepspeed: got {deepspeed!r}, expected the package deepspeed to be installed")
    try:
        settings = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"deepspeed: there is no file {deepspeed!r}; see configs/deepspeed/zero2.json") from None
    except ValueError as error:
        raise ValueError(f"deepspeed: {deepspeed} is no valid JSON ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"deepspeed: {deepspeed} holds a {type(settings).__name__}, expected a mapping")
