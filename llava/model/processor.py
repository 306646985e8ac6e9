"""The image processor of a checkpoint: its own, its vision tower's, or CLIP's."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.mm_utils import load_image_processor
from llava.model.checkpoint.files import first_line, read_json
from llava.model.checkpoint.tower import find_tower

_FILES = ("preprocessor_config.json", "processor_config.json")


def load_processor(folders: list[Path], config: PreTrainedConfig, **hub) -> CLIPImageProcessorPil | None:
    """An image processor that gives what the vision tower takes.

    Parameters
    ----------
    folders : list of Path
        The checkpoint's, the likeliest first. Without a processor there, the tower's own is taken; without one, CLIP's
        mean and standard deviation at the tower's image size.
    config : PreTrainedConfig
        Ours, with `mm_vision_config`.
    **hub
        As `locate` takes them.

    Returns
    -------
    CLIPImageProcessorPil or None
        None only for a model without a vision tower.

    Raises
    ------
    ValueError
        If the processor that is there cannot be read, is not CLIP's, or gives images of another size.
    """
    if config.mm_vision_config is None:
        return None
    side = config.mm_vision_config.get("image_size", 224)
    for folder in folders:
        if _has_processor(folder):
            return _read(folder, side)
    tower = find_tower(config.mm_vision_tower, folders, **hub)
    if tower is not None and _has_processor(tower):
        return _read(tower, side)
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _has_processor(folder: Path) -> bool:
    return any((folder / name).is_file() and _image_part(folder / name) for name in _FILES)


def _image_part(path: Path) -> dict:
    """The settings of the image processor in a file; Hugging Face nests them in those of the whole processor."""
    facts = read_json(path)
    if isinstance(facts.get("image_processor"), dict):
        return facts["image_processor"]
    return facts if {"image_processor_type", "crop_size"} & set(facts) else {}


def _read(folder: Path, side: int) -> CLIPImageProcessorPil:
    path = next(folder / name for name in _FILES if (folder / name).is_file() and _image_part(folder / name))
    kind = _image_part(path).get("image_processor_type", "CLIPImageProcessor")
    if not str(kind).startswith(("CLIP", "Llava")):
        raise ValueError(f"{path}: image_processor_type is {kind!r}, only CLIP's is supported")
    try:
        processor = load_image_processor(folder)
        size = processor.crop_size["height"], processor.crop_size["width"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: no image processor can be read ({first_line(error)})") from None
    if size != (side, side):
        raise ValueError(f"{path}: crop_size is {size[0]} x {size[1]}, the vision tower takes {side} x {side}")
    return processor
