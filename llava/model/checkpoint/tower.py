"""The vision tower of a checkpoint: its shape and its weights, inside or in a folder or hub id of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, PreTrainedConfig

from llava.anyres import parse_grid_pinpoints
from llava.model.checkpoint.config import check_sizes, check_small
from llava.model.checkpoint.files import first_line, read_complete, read_json, shape_of
from llava.model.checkpoint.names import TOWER, is_packing, ours, translated
from llava.model.checkpoint.places import locate

_LLAVA = ("llava", "llava_llama")
_HEAD_WIDTH = 64  # of every CLIP that OpenAI has released

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


def add_tower(
    config: PreTrainedConfig,
    weights: dict[str, Any],
    folders: list[Path],
    base: PreTrainedConfig | None = None,
    **hub,
) -> None:
    """Settle `config.mm_vision_config`, and add the tower's weights where they lie elsewhere.

    Weights inside the checkpoint win over those of the tower it names: they may have been trained. The tower may be a
    LLaVA's folder; then the checkpoint may hold a part of the tower's weights, and the others are taken from there.

    Parameters
    ----------
    config : PreTrainedConfig
        Ours; `mm_vision_config` and `mm_hidden_size` are filled in.
    weights : dict
        Of the checkpoint, under our names.
    folders : list of Path
        Where a relative `mm_vision_tower` is looked for.
    base : PreTrainedConfig, optional
        Of the model under an adapter or a projector, which may bring a tower.
    **hub
        As `locate` takes them.

    Raises
    ------
    ValueError
        If the tower cannot be found or is no CLIP.
    """
    inside = any(name.startswith(TOWER) for name in weights)
    if config.mm_vision_config is None and base is not None and inside:
        config.mm_vision_config = base.mm_vision_config
    if config.mm_vision_config is None and config.mm_vision_tower:
        try:
            config.mm_vision_config = _read_config(_locate(config.mm_vision_tower, folders, **hub))
        except ValueError:
            config.mm_vision_config = _shape_of_openai_clip(config.mm_vision_tower, weights) if inside else None
            if config.mm_vision_config is None:
                raise
    if config.mm_vision_config is None:
        return
    _check(config)
    if not inside and config.mm_vision_tower:
        weights |= _weights(_locate(config.mm_vision_tower, folders, **hub))
    elif config.mm_vision_tower and (lender := _llava_folder(config.mm_vision_tower, folders)):
        weights |= _weights(lender) | {name: value for name, value in weights.items() if name.startswith(TOWER)}


def _beside(named: str, folders: list[Path]) -> Path | None:
    """The folder that an absolute path, or one relative to the checkpoint's folder, leads to."""
    return next((folder / named for folder in folders if os.path.isfile(folder / named / "config.json")), None)


def _llava_folder(named: str, folders: list[Path]) -> Path | None:
    """The folder that `mm_vision_tower` names, if it is a LLaVA's."""
    folder = _beside(named, folders)
    return folder if folder and read_json(folder / "config.json").get("model_type") in _LLAVA else None


def _locate(named: str, folders: list[Path], **hub) -> Path:
    """`mm_vision_tower` is an absolute path, one relative to the checkpoint's folder, or a hub id."""
    if folder := _beside(named, folders):
        return folder
    hub.pop("revision", None)  # the checkpoint's, not the tower's
    return locate(named, "mm_vision_tower", "no CLIP folder or reachable hub model", **hub)


def find_tower(named: str | None, folders: list[Path], **hub) -> Path | None:
    """The folder of the tower that a configuration names, None if there is none within reach."""
    try:
        return _locate(named, folders, **hub) if named else None
    except ValueError:
        return None


def _read_config(folder: Path) -> dict:
    """CLIP's vision configuration, from a tower's config.json, a whole CLIP's or a LLaVA's."""
    facts = read_json(folder / "config.json")
    own = facts
    if facts.get("model_type") in ("clip", *_LLAVA):
        own = facts.get("vision_config") or facts.get("mm_vision_config") or {}
    kind = own.get("model_type", "clip_vision_model" if own is not facts else None)
    if kind not in ("clip_vision_model", "clip"):
        raise ValueError(f"mm_vision_tower is {str(folder)!r}: its model_type is {kind!r}, only CLIP is supported")
    return _made({key: value for key, value in own.items() if key != "model_type"}).to_dict()


def _made(facts: Mapping[str, Any]) -> CLIPVisionConfig:
    try:
        return CLIPVisionConfig(**facts)
    except (StrictDataclassError, ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"vision tower: no CLIP vision configuration ({first_line(error)})") from None


def _check(config: PreTrainedConfig) -> None:
    """What a CLIP vision configuration takes without a word, and what must fit the rest of ours."""
    vision = config.mm_vision_config
    kind = vision.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise ValueError(f"mm_vision_config.model_type is {kind!r}: only 'clip_vision_model' is supported")
    made = _made({key: value for key, value in vision.items() if key != "model_type"})
    try:
        check_sizes(made, _SIZES)
        check_small("layer_norm_eps", made.layer_norm_eps)
    except ValueError as error:
        raise ValueError(f"vision tower: {error}") from None
    if made.hidden_size % made.num_attention_heads or made.image_size < made.patch_size:
        raise ValueError(
            f"vision tower: width {made.hidden_size}, {made.num_attention_heads} heads, images of {made.image_size} "
            f"and patches of {made.patch_size} pixels do not go together"
        )
    sizes = parse_grid_pinpoints(config.image_grid_pinpoints) if config.image_aspect_ratio == "anyres" else []
    wrong = [size for size in sizes if any(pixels % made.image_size for pixels in size)]
    if wrong:
        raise ValueError(
            f"image_grid_pinpoints has {list(wrong[0])}: width and height must be multiples of the tiles' "
            f"{made.image_size} pixels"
        )
    if config.mm_hidden_size is None:
        config.mm_hidden_size = made.hidden_size
    if config.mm_hidden_size != made.hidden_size:
        raise ValueError(f"mm_hidden_size is {config.mm_hidden_size}: the vision tower's width is {made.hidden_size}")


def _weights(folder: Path) -> dict[str, Any]:
    """A tower's weights under our names; the text half of a whole CLIP and the rest of a LLaVA are left out."""
    own = {}
    for name, value in read_complete(folder).items():
        if re.match(r"(vision_model\.|embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.)", name):
            own["vision_tower." + name] = value
        elif ours(name).startswith(TOWER):
            own[name] = value
    if not own:
        raise ValueError(f"mm_vision_tower is {str(folder)!r}: it holds no weights of a CLIP vision tower")
    return translated(own, folder)


def _shape_of_openai_clip(named: str, weights: Mapping[str, Any]) -> dict | None:
    """OpenAI's CLIP is known by the shapes of its weights: a checkpoint that holds them needs no hub."""
    if not named.startswith("openai/clip-vit"):
        return None
    own = {name.removeprefix(TOWER): shape_of(value) for name, value in weights.items() if not is_packing(name)}
    try:
        width, _, patch, _ = own["embeddings.patch_embedding.weight"]
        positions = own["embeddings.position_embedding.weight"][0]
        mlp = own["encoder.layers.0.mlp.fc1.bias"][0]
    except (KeyError, ValueError):
        return None
    blocks = {name.split(".")[2] for name in own if name.startswith("encoder.layers.")}
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=len(blocks),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        image_size=round((positions - 1) ** 0.5) * patch,
        patch_size=patch,
    ).to_dict()
