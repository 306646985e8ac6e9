"""Command-line arguments of ``llava/train/train.py``, under LLaVA's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import transformers

from llava.conversation import conv_templates

ASPECT_RATIOS = ("square", "pad", "anyres")


@dataclass
class ModelArguments:
    """Which model, and which parts of it learn."""

    model_name_or_path: str = field(
        metadata={"help": "LLaVA checkpoint of either format, or a LLaMA language model together with --vision_tower"}
    )
    version: str = field(default="v1", metadata={"help": "prompt template: v1 for dialogues, plain for captions"})
    vision_tower: str | None = field(default=None, metadata={"help": "CLIP folder or hub id, for a base without one"})
    mm_projector_type: str = field(default="mlp2x_gelu", metadata={"help": "linear or mlp2x_gelu; for a new projector"})
    mm_vision_select_layer: int = field(default=-2, metadata={"help": "hidden state that gives the features"})
    mm_vision_select_feature: str = field(default="patch", metadata={"help": "patch or cls_patch"})
    pretrain_mm_mlp_adapter: str | None = field(
        default=None, metadata={"help": "mm_projector.bin of the alignment stage"}
    )
    tune_mm_mlp_adapter: bool = field(default=False, metadata={"help": "train the projector alone (alignment stage)"})
    freeze_mm_mlp_adapter: bool = field(default=False, metadata={"help": "keep the projector as it is"})
    freeze_backbone: bool = field(default=False, metadata={"help": "keep the language model as it is"})

    def check(self) -> None:
        """Raise ``ValueError`` with one line for what cannot work."""
        if self.version not in conv_templates:
            raise ValueError(f"version: {self.version!r} is unknown, expected one of {sorted(conv_templates)}")
        if self.tune_mm_mlp_adapter and self.freeze_mm_mlp_adapter:
            raise ValueError("tune_mm_mlp_adapter and freeze_mm_mlp_adapter: both are set, at most one can be")
        if self.freeze_backbone and self.freeze_mm_mlp_adapter:
            raise ValueError("freeze_backbone and freeze_mm_mlp_adapter: nothing would be left to train")
        if self.pretrain_mm_mlp_adapter and not Path(self.pretrain_mm_mlp_adapter).is_file():
            raise ValueError(f"pretrain_mm_mlp_adapter: there is no file {self.pretrain_mm_mlp_adapter!r}")


@dataclass
class DataArguments:
    """What to learn from: LLaVA's JSON, or scenes drawn on the fly."""

    data_path: str | None = field(default=None, metadata={"help": "LLaVA JSON: a list with conversations and images"})
    image_folder: str = field(default=".", metadata={"help": "folder that image names in the JSON are relative to"})
    image_aspect_ratio: str = field(default="pad", metadata={"help": f"one of {', '.join(ASPECT_RATIOS)}"})
    mini_scenes: int = field(
        default=0, metadata={"help": "instead of data_path: so many questions about synthetic scenes"}
    )

    def check(self) -> None:
        """Raise ``ValueError`` with one line for what cannot work."""
        if (self.data_path is None) == (self.mini_scenes <= 0):
            raise ValueError("data_path: give either data_path or a positive mini_scenes")
        if self.data_path is not None and not Path(self.data_path).is_file():
            raise ValueError(f"data_path: there is no file {self.data_path!r}")
        if self.image_aspect_ratio not in ASPECT_RATIOS:
            raise ValueError(
                f"image_aspect_ratio: {self.image_aspect_ratio!r} is not one of {', '.join(ASPECT_RATIOS)}"
            )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' arguments, with the defaults that multimodal batches need."""

    model_max_length: int = field(default=2048, metadata={"help": "longer conversations are cut"})
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "learning rate of the projector, if different"}
    )
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "batches of similar length, with or without images, as LLaVA's full tuning"}
    )
    remove_unused_columns: bool = False
    report_to: str = "none"
