"""Folders of stock models: what they hold, and the model with its own processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.utils import PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, is_torchvision_available

from llava.model.checkpoint.files import first_line, read_complete, read_json
from llava.model.checkpoint.names import listed
from llava.model.checkpoint.places import locate
from llava.model.checkpoint.settings import LoadSettings
from llava.model.convert.internvl import load_internvl, original_facts
from llava.model.convert.internvl_config import ORIGINAL, translated
from llava.model.convert.internvl_processor import processor_parts
from llava.model.hosted import HOSTS, host_class
from llava.video import FrameProcessor

UNPACKED = ["vision_tower", "image_tower", "video_tower", "multi_modal_projector", "visual", "lm_head"]
_SAID = OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError


def stock_config(path: object, **hub: Any) -> tuple[Path, PreTrainedConfig] | None:
    """The folder and the configuration of a stock model; None for what is none, or what our own LLaVA computes.

    Parameters
    ----------
    path : str or path
        Folder or hub id.
    **hub
        As `locate` takes them.

    Raises
    ------
    ValueError
        If it is a stock model of a kind that cannot be hosted, or its weights are not all there.
    """
    folder = locate(path, "model_path", **hub)
    if not (folder / "config.json").is_file():
        return None
    facts = read_json(folder / "config.json")
    if facts.get("model_type") == ORIGINAL:
        return _with_weights(path, folder), _said_of(path, translated, facts)
    if facts.get("model_type") not in HOSTS or _ours(facts):
        return None
    try:
        config = AutoConfig.from_pretrained(folder)
    except _SAID as error:
        raise ValueError(f"{path}: config.json: {first_line(error)}") from None
    try:
        host_class(config.model_type).check_kinds(config.get_text_config(), config.vision_config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return _with_weights(path, folder), config


def _with_weights(path: object, folder: Path) -> Path:
    """The folder, if all of its files of weights are there."""
    if not read_complete(folder):
        raise ValueError(f"{path}: holds no weights, expected *.safetensors or pytorch_model*.bin")
    return folder


def _said_of(path: object, translate: Callable, *given: Any) -> Any:
    """What a translation gives; what it refuses is said of the checkpoint."""
    try:
        return translate(*given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _ours(facts: dict[str, Any]) -> bool:
    """Whether a configuration of a known type is our own loader's: what it computes, or refuses in its own words."""
    if not facts["model_type"].startswith(("llava", "video_llava")):
        return False
    parts = [facts.get(name) for name in ("text_config", "vision_config")]
    if not all(isinstance(part, dict) for part in parts):
        return True
    llama, clip = "llama", "clip_vision_model"
    text, tower = (part.get("model_type", kind) for part, kind in zip(parts, (llama, clip), strict=True))
    host = host_class("llava")
    stranger = text not in host.texts or tower not in host.kinds
    return facts["model_type"] == "llava" and (stranger or (text, tower) == (llama, clip))


def load_stock(
    path: object, folder: Path, config: PreTrainedConfig, settings: LoadSettings
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A stock model in evaluation mode, and its processor.

    Raises
    ------
    ValueError
        If a weight is missing or has no place, or the processor cannot be read.
    """
    processor = load_stock_processor(folder, config)
    arguments = dict(settings.arguments)
    quantise = arguments.get("quantization_config")
    if quantise is not None and not quantise.llm_int8_skip_modules:
        quantise.llm_int8_skip_modules = UNPACKED
    if facts := original_facts(folder):
        return load_internvl(folder, config, facts, processor.tokenizer, arguments).eval(), processor
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except _SAID as error:
        raise ValueError(f"{path}: cannot be loaded ({first_line(error)})") from None
    wrong = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} weights are missing or of another shape ({listed(wrong)})")
    if unknown := set(info["unexpected_keys"]):
        raise ValueError(f"{path}: {len(unknown)} weights have no place in the model ({listed(unknown)})")
    return model.eval(), processor


def load_stock_processor(folder: Path, config: PreTrainedConfig) -> ProcessorMixin:
    """A stock model's processor; its part for videos is our own, which gives the same pixels on every machine."""
    kind = PROCESSOR_MAPPING[type(config)]
    if facts := original_facts(folder):
        processor = _images_only(kind)(**_said_of(folder, processor_parts, folder, config, facts))
        processor.video_processor = FrameProcessor(processor.image_processor.to_dict())
        return processor
    videos = any("video" in name for name in kind.get_attributes())
    if not is_torchvision_available() and videos:
        kind = _images_only(kind)
    framed = videos and hasattr(config.vision_config, "image_size")  # Qwen takes frames of any size, as its own makes
    try:
        processor = kind.from_pretrained(folder)
        if framed:
            own = None if host_class(config.model_type).frames_are_tiles else _video_settings(folder)
            processor.video_processor = FrameProcessor(own or processor.image_processor.to_dict())
    except _SAID as error:
        raise ValueError(f"{folder}: no processor can be read ({first_line(error)})") from None
    if not framed:
        return processor
    side = config.vision_config.image_size
    wanted = tuple(side) if isinstance(side, list | tuple) else (side, side)
    if processor.video_processor.size != wanted:
        made, taken = (" x ".join(map(str, size)) for size in (processor.video_processor.size, wanted))
        raise ValueError(f"{folder}: the processor makes frames of {made}, the vision tower takes {taken}")
    return processor


def _video_settings(folder: Path) -> dict | None:
    """What a folder says of frames apart from images; None where it says nothing."""
    own, whole = folder / VIDEO_PROCESSOR_NAME, folder / PROCESSOR_NAME
    if whole.is_file() and isinstance(nested := read_json(whole).get("video_processor"), dict):
        return nested
    return read_json(own) if own.is_file() else None


def _images_only(kind: type) -> type:
    """A processor's class under its own name that does without its part for videos."""
    return type(kind.__name__, (_ImagesOnly, kind), {"__module__": kind.__module__})


class _ImagesOnly:
    """Put before a processor's class: its part for videos, which transformers cannot make here, is left out."""

    @classmethod
    def _get_arguments_from_pretrained(cls, folder, processor_dict=None, **kwargs):
        makers = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
        return [makers[name].from_pretrained(folder) if name in makers else None for name in cls.get_attributes()]

    def check_argument_for_proper_class(self, name, argument):
        return None if argument is None else super().check_argument_for_proper_class(name, argument)
