"""Checkpoints in the original LLaVA format and in Hugging Face's, described for one loader."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedConfig

logger = logging.getLogger(__name__)

# Names of weights: theirs -> ours. transformers has saved its LLaVA under several names over the years.
_HUGGING_FACE_KEYS = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head": "lm_head",
    r"^model\.language_model\.": "model.",
    r"^(model\.)?vision_tower\.(vision_model\.)?": "model.vision_tower.vision_tower.",
    r"^(model\.)?multi_modal_projector\.linear_1": "model.mm_projector.0",
    r"^(model\.)?multi_modal_projector\.linear_2": "model.mm_projector.2",
}
_ORIGINAL_KEYS = {r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.vision_tower."}
_FEATURES = {"default": "patch", "full": "cls_patch"}


@dataclass
class Checkpoint:
    """What is needed to load one: our configuration, names of weights, and where a separate vision tower lies."""

    config: PreTrainedConfig
    key_mapping: dict[str, str]
    vision_tower: str | None

    @contextmanager
    def expecting_a_separate_tower(self) -> Iterator[None]:
        """Hold back transformers' report of missing weights while it loads a checkpoint whose tower lies elsewhere."""
        before = transformers.logging.get_verbosity()
        if self.vision_tower is not None:
            transformers.logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(before)

    def complete(self, tower: torch.nn.Module | None, missing_keys: Iterable[str]) -> None:
        """Copy the weights of the separate vision tower if they were missing, and warn of any others.

        Raises
        ------
        ValueError
            If the tower's weights are missing and the checkpoint names no place for them.
        """
        missing = [key for key in missing_keys if "vision_tower" not in key]
        if self.vision_tower is not None and missing:
            logger.warning("weights missing from the checkpoint, left random: %s", ", ".join(sorted(missing)))
        if len(missing) == len(list(missing_keys)):
            return
        if self.vision_tower is None:
            raise ValueError(
                "mm_vision_tower: the checkpoint has no vision tower and names no CLIP folder or hub id for it"
            )
        weights = CLIPVisionModel.from_pretrained(self.vision_tower, dtype=tower.dtype).state_dict()
        tower.vision_tower.load_state_dict(weights)


def describe_checkpoint(path: str | Path, config_class: type, config: PreTrainedConfig | None = None) -> Checkpoint:
    """Read a checkpoint's config.json.

    Raises
    ------
    ValueError
        If there is no checkpoint at `path`, it is no LLaVA, or its vision tower cannot be found.
    """
    facts = config.to_dict() if config is not None else _read_config(path)
    if facts.get("model_type") == "llava" and "mm_vision_tower" not in facts:
        ours = _from_hugging_face(transformers.LlavaConfig.from_dict(facts), facts, config_class)
        return Checkpoint(ours, _HUGGING_FACE_KEYS, None)
    if config is None:
        if facts.get("model_type") not in ("llava", "llava_llama", "llama"):
            raise ValueError(f"{path}: model_type is {facts.get('model_type')!r}, it must be 'llava' or 'llava_llama'")
        config = config_class.from_dict({**facts, "model_type": config_class.model_type})
    tower = None
    if config.mm_vision_config is None and config.mm_vision_tower:
        tower = _locate_tower(config.mm_vision_tower, path)
        try:
            config.mm_vision_config = CLIPVisionConfig.from_pretrained(tower).to_dict()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"mm_vision_tower is {config.mm_vision_tower!r}: no CLIP folder or hub model ({error})"
            ) from None
    if config.mm_vision_config is not None and config.mm_hidden_size is None:
        config.mm_hidden_size = config.mm_vision_config["hidden_size"]
    return Checkpoint(config, _ORIGINAL_KEYS, tower)


def _read_config(path: str | Path) -> dict:
    try:
        facts, _ = PreTrainedConfig.get_config_dict(str(path))
    except OSError:
        facts = {}
    if not facts:
        raise ValueError(f"model_path is {str(path)!r}: neither a folder with a config.json nor a reachable hub model")
    return facts


def _locate_tower(name: str, checkpoint: str | Path) -> str:
    """`mm_vision_tower` is an absolute path, one relative to the checkpoint's folder, or a hub id."""
    for place in (Path(checkpoint) / name, Path(name)):
        if (place / "config.json").is_file():
            return str(place.resolve())
    return name


def _from_hugging_face(theirs, facts: dict, config_class: type) -> PreTrainedConfig:
    """Translate `transformers.LlavaConfig`."""
    text = theirs.text_config.to_dict()
    if text["model_type"] != "llama":
        raise ValueError(f"text_config.model_type is {text['model_type']!r}: only 'llama' is supported")
    for field in ("model_type", "architectures", "_name_or_path", "transformers_version", "dtype"):
        text.pop(field, None)
    vision = theirs.vision_config.to_dict()
    if vision["model_type"] != "clip_vision_model":
        raise ValueError(f"vision_config.model_type is {vision['model_type']!r}: only 'clip_vision_model' is supported")
    config = config_class(
        **text,
        mm_vision_config=vision,
        mm_hidden_size=vision["hidden_size"],
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=theirs.vision_feature_layer,
        mm_vision_select_feature=_FEATURES[theirs.vision_feature_select_strategy],
        image_aspect_ratio=facts.get("image_aspect_ratio", "pad"),
        dtype=facts.get("dtype", facts.get("torch_dtype")),
    )
    config.tie_word_embeddings = theirs.tie_word_embeddings
    return config
