"""The sizes of a model that costs depend on, read from any LLaVA configuration."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from mustdrop.checks import shown
from mustdrop.read import read_json

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1}
_CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_TOWERS = {
    "openai/clip-vit-large-patch14-336": {**_CLIP, "patch_size": 14, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP, "patch_size": 14, "image_size": 224},
}
_LLAVA_15 = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu"}
_CANVASES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_TILED_15 = {**_LLAVA_15, "image_aspect_ratio": "anyres", "image_grid_pinpoints": _CANVASES}
_SIZE_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
_MAY_BE_NONE = ("vision_layers", "vision_window", "deepstack")
NAMED: dict[str, Mapping | Path] = {
    "llava-1.5-7b": _LLAVA_15,
    "llava-1.5-13b": {**_LLAVA_15, **_SIZE_13B},
    "llava-next-7b": {**_TILED_15, "mm_patch_merge_type": "spatial_unpad"},
    "llava-next-7b-2880": {**_TILED_15, "protocol": "flat"},
    "video-llava-7b": {
        "mm_vision_tower": "openai/clip-vit-large-patch14",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "cls_patch",
    },
    "llava-mini": Path(__file__).resolve().parents[1] / "checkpoints" / "llava-mini",
}


_TILED = ("llava_next", "llava_onevision")


@dataclass(frozen=True)
class ImageShape:
    """An image before anything is dropped: views that the tower sees, vision tokens, and newlines, which are text."""

    views: int
    tokens: int
    newlines: int = 0


@dataclass(frozen=True)
class Tiles:
    """How a model cuts images into tiles.

    Attributes
    ----------
    canvases : tuple of (int, int)
        Widths and heights in pixels of what an image is fitted into, each whole tiles.
    merge : {"flat", "spatial", "spatial_unpad"}
        As `mm_patch_merge_type` of LLaVA names it.
    most : int, optional
        Tiles' worth of tokens to which an image of more is shrunk (LLaVA-OneVision's `anyres_max_9`).
    """

    canvases: tuple[tuple[int, int], ...]
    merge: str = "flat"
    most: int | None = None

    def image(self, size: tuple[int, int] | None, tile: int, side: int) -> ImageShape:
        """An image of a size (width, height) in pixels, by default one that fills the largest canvas.

        `tile` is the width of a tile in pixels, `side` in patches.
        """
        import torch
        from transformers.models.llava_next.modeling_llava_next import select_best_resolution, unpad_image

        width, height = size or max(self.canvases, key=lambda canvas: canvas[0] * canvas[1])
        chosen = select_best_resolution((height, width), [(high, wide) for wide, high in self.canvases])
        rows, columns = (pixels // tile for pixels in chosen)
        grid = rows * side, columns * side
        newlines = 0
        if self.merge == "spatial_unpad":
            grid = tuple(unpad_image(torch.empty(1, *grid, device="meta"), (height, width)).shape[1:])
            if self.most is not None:
                ratio = math.sqrt(grid[0] * grid[1] / (self.most * side**2))
                grid = tuple(int(length // ratio) for length in grid) if ratio > 1.1 else grid
            newlines = grid[0]
        return ImageShape(1 + rows * columns, side**2 + grid[0] * grid[1], newlines)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a vision tower, a projector and a decoder: all that costs depend on.

    Attributes
    ----------
    image_size, patch_size : int
        Pixels along a side; the tower sees `(image_size // patch_size)^2` patches.
    vision_hidden, vision_heads, vision_mlp : int
        Width, attention heads and MLP size of the tower's blocks.
    vision_layers : int
        Blocks that are run: features from hidden state -2 of a 24-block tower need 23.
    vision_cls, feature_cls : bool
        Whether the tower has a CLS token, and whether it is part of the features. Of Video-LLaVA, what holds for
        videos: their frames keep it, its images do not.
    projector_type : str
        As `mm_projector_type` of LLaVA names it.
    projector_widths : tuple of int
        From the features to the decoder, one linear layer between neighbours; a single width is no projector.
    hidden, layers, heads, kv_heads, head_dim, mlp, vocab : int
        The decoder.
    dtype_bytes : int
        Bytes of one cached number.
    tiles : Tiles or None
        How images are cut into tiles, None where they are not.
    grid : tuple of int, optional
        Rows and columns of an image's patches where images are not squares of `image_size`.
    merge : int
        Patches along a side of what becomes one token: a merger's or a pixel shuffle's unit.
    frames : int
        Frames that a patch spans; a still image is so many equal ones.
    vision_products : int
        Matrices of a vision block's MLP: 3 if it is gated.
    vision_window : int
        Tokens along a side of the windows that blocks attend within, 0 for none.
    vision_full_blocks : tuple of int
        Blocks that attend everywhere although there are windows.
    deepstack : int
        Mergers besides the projector, each of its widths, that feed decoder layers.
    """

    name: str
    image_size: int
    patch_size: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    vision_cls: bool
    feature_cls: bool
    projector_type: str
    projector_widths: tuple[int, ...]
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    dtype_bytes: int = 2
    tiles: Tiles | None = None
    grid: tuple[int, int] | None = None
    merge: int = 1
    frames: int = 1
    vision_products: int = 2
    vision_window: int = 0
    vision_full_blocks: tuple[int, ...] = ()
    deepstack: int = 0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < (field.name not in _MAY_BE_NONE):
                raise ValueError(f"{self.name}: {field.name} is {value}, it must be positive")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.name}: kv_heads is {self.kv_heads}, it must divide the {self.heads} heads")

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of an image's tokens."""
        rows, columns = self.grid or (self.image_size // self.patch_size,) * 2
        return rows // self.merge, columns // self.merge

    @property
    def patches(self) -> int:
        """Patches of one view: an image, or a tile of it."""
        return self.view_tokens * self.merge**2

    @property
    def view_tokens(self) -> int:
        """Vision tokens of one view."""
        return math.prod(self.token_grid)

    @property
    def vision_tokens(self) -> int:
        """Vision tokens of one image in an unchanged decoder; CLS and newlines, where they come along, count as text.

        Of one that fills the largest canvas, where images are cut into tiles.
        """
        return self.image().tokens

    def image(self, size: tuple[int, int] | None = None) -> ImageShape:
        """An image of a size (width, height) in pixels, by default one that fills the largest canvas."""
        if self.tiles is None:
            return ImageShape(1, self.view_tokens)
        return self.tiles.image(size, self.image_size, self.image_size // self.patch_size)

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers; 524,288 bytes for LLaVA-1.5-7B in float16."""
        return 2 * self.kv_heads * self.head_dim * self.dtype_bytes * self.layers

    @classmethod
    def named(cls, name: str, dtype: str = "float16") -> ModelShape:
        """A shape from a name in `NAMED`; ValueError if it is not there."""
        if name not in NAMED:
            known = ", ".join(NAMED)
            raise ValueError(f"model is {shown(name)}: it must be {known}, a config.json or a folder with one")
        return cls.from_config(NAMED[name], name, dtype)

    @classmethod
    def from_config(cls, config: Mapping | str | Path, name: str | None = None, dtype: str = "float16") -> ModelShape:
        """A shape from a checkpoint's configuration, in the original LLaVA format or in Hugging Face's.

        Parameters
        ----------
        config : mapping or path
            The contents of a config.json, its path, or its folder. Omitted keys get the defaults of transformers'
            configuration classes. A tower that is a path is looked for from the configuration's folder first.
        name : str, optional
            By default the folder's.
        dtype : str
            Type of the cached keys and values, a key of `DTYPE_BYTES`.

        Raises
        ------
        ValueError
            If the file, the tower or a value cannot be used.
        """
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype is {dtype!r}: it must be one of {', '.join(DTYPE_BYTES)}")
        folder = Path()
        if not isinstance(config, Mapping):
            path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
            config, folder = _read_json(path), path.resolve().parent
        read = _read_original if {"mm_vision_tower", "mm_vision_config"} & set(config) else _read_hugging_face
        text, vision, layer, feature, projector, tiles = read(config, folder)
        states = [index % (vision.num_hidden_layers + 1) for index in (layer if isinstance(layer, list) else [layer])]
        return cls(
            name=name or folder.name or "config",
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            vision_hidden=vision.hidden_size,
            vision_layers=max(states),
            vision_heads=vision.num_attention_heads,
            vision_mlp=vision.intermediate_size,
            vision_cls=vision.model_type == "clip_vision_model",
            feature_cls=feature in ("cls_patch", "full"),
            projector_type=projector,
            projector_widths=(vision.hidden_size * len(states), *[text.hidden_size] * _projector_depth(projector)),
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            mlp=text.intermediate_size,
            vocab=text.vocab_size,
            dtype_bytes=DTYPE_BYTES[dtype],
            tiles=tiles(vision.image_size),
        )


def _read_original(config: Mapping, folder: Path) -> tuple:
    """Text and vision configuration, feature layer, feature kind, projector type and tiles of an original config.

    The tiles are a function of a tile's width in pixels.
    """
    from transformers import LlamaConfig, MistralConfig

    tower, vision = config.get("mm_vision_tower"), config.get("mm_vision_config")
    if not vision and tower in _TOWERS:
        vision = _TOWERS[tower]
    elif not vision:
        found = [place for place in (folder / str(tower), Path(str(tower))) if (place / "config.json").is_file()]
        if not found:
            known = ", ".join(_TOWERS)
            raise ValueError(f"mm_vision_tower is {tower!r}: it must be {known} or the path of a CLIP folder")
        vision = _read_json(found[0] / "config.json")
    kind = MistralConfig if config.get("model_type") == "llava_mistral" else LlamaConfig
    names = {field.name for field in fields(kind)} - {"model_type"}
    text = filled(kind, {key: value for key, value in config.items() if key in names})
    layer, feature = config.get("mm_vision_select_layer", -2), config.get("mm_vision_select_feature", "patch")
    projector = config.get("mm_projector_type", "linear")

    def tiles(tile: int) -> Tiles | None:
        if config.get("image_aspect_ratio") != "anyres":
            return None
        if config.get("protocol") == "flat":
            return Tiles(((2 * tile, 2 * tile),))
        canvases = _canvases(config.get("image_grid_pinpoints"))
        return Tiles(canvases, config.get("mm_patch_merge_type") or "flat")

    return text, _vision_config(vision), layer, feature, projector, tiles


def _canvases(pinpoints: object) -> tuple[tuple[int, int], ...]:
    """Pairs of pixels from `image_grid_pinpoints`, a list or a text that spells one."""
    with suppress(SyntaxError, ValueError):
        pinpoints = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
    try:
        canvases = tuple((int(first), int(second)) for first, second in pinpoints)
    except (TypeError, ValueError):
        canvases = ()
    if not canvases:
        raise ValueError(f"image_grid_pinpoints is {pinpoints!r}: it must be a list of pairs of pixels")
    return canvases


def _read_hugging_face(config: Mapping, folder: Path) -> tuple:
    """The same of a Hugging Face configuration of the LLaVA family."""
    import transformers

    kind = config.get("model_type", "llava")
    if kind not in ("llava", "video_llava", *_TILED) or not {"model_type", "text_config"} & set(config):
        raise ValueError(
            f"{folder.name or 'config'}: no LLaVA configuration, it must have mm_vision_tower (original format) or, "
            f"with text_config and vision_config (Hugging Face format), model_type 'llava', "
            f"'video_llava', {', '.join(map(repr, _TILED))}"
        )
    classes = {
        "llava": "LlavaConfig",
        "llava_next": "LlavaNextConfig",
        "llava_onevision": "LlavaOnevisionConfig",
        "video_llava": "VideoLlavaConfig",
    }
    theirs = filled(getattr(transformers, classes[kind]), config)
    vision = _vision_config(theirs.vision_config.to_dict(), kind == "llava_onevision")
    most = getattr(theirs, "vision_aspect_ratio", "").removeprefix("anyres_max_")

    def tiles(tile: int) -> Tiles | None:
        if kind not in _TILED:
            return None
        canvases = tuple((width, height) for height, width in _canvases(theirs.image_grid_pinpoints))
        return Tiles(canvases, "spatial_unpad", int(most) if most.isdigit() else None)

    feature = {"llava_onevision": "patch", "video_llava": "full"}.get(kind)
    feature = feature or theirs.vision_feature_select_strategy
    return theirs.text_config, vision, theirs.vision_feature_layer, feature, "mlp2x_gelu", tiles


def _vision_config(values: Mapping, siglip: bool = False):
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    values = values.get("vision_config") or values.get("mm_vision_config") or values
    known = SiglipVisionConfig if siglip else CLIPVisionConfig
    kind = values.get("model_type", known.model_type)
    if kind != known.model_type:
        raise ValueError(f"the vision tower's model_type is {kind!r}: only {known.model_type!r} is supported")
    return filled(known, values)


def filled(config_class: type, values: Mapping):
    """A configuration of transformers with its defaults; whatever it refuses becomes one line."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class.from_dict(json.loads(json.dumps(dict(values))))
    except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{config_class.__name__}: {' '.join(str(error).split())}") from None


def _read_json(path: Path) -> dict:
    try:
        values = read_json(path, most=1 << 24)
    except ValueError as error:
        raise ValueError(f"{path}: no readable config.json ({str(error).removeprefix(f'{path}: ')})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: it must hold a JSON object, not a {type(values).__name__}")
    return values


def _projector_depth(kind: str) -> int:
    """Linear layers of a projector type."""
    if match := re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind):
        return int(match[1])
    if kind not in ("linear", "identity"):
        raise ValueError(f"mm_projector_type is {kind!r}: it must be 'linear', 'identity' or like 'mlp2x_gelu'")
    return int(kind == "linear")
