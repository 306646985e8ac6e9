"""The sizes of models beside LLaVA: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and InternVL, from their configurations.

Their towers hand over units of several patches, and Qwen's take images of any size: a shape is of one such size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from mustdrop import shape as llava
from mustdrop.read import read_json
from mustdrop.shape import DTYPE_BYTES, ModelShape

DEFAULT_PIXELS = 672
"""Along a side, where a configuration names no size of images: 576 tokens of 28 pixels, as many as LLaVA-1.5 has."""

_QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
_INTERNVIT_300M = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
}
_INTERNVIT_6B = {
    **_INTERNVIT_300M,
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
}


def _internvl(vision: Mapping, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict:
    text = {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }
    return {"model_type": "internvl_chat", "vision_config": vision, "llm_config": text}


NAMED: dict[str, Mapping[str, Any]] = {
    "qwen2-vl-7b": {
        "model_type": "qwen2_vl",
        "text_config": _QWEN_7B,
        "vision_config": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14},
    },
    "qwen2.5-vl-7b": {
        "model_type": "qwen2_5_vl",
        "text_config": _QWEN_7B,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": 3584,
        },
    },
    "internvl2-4b": _internvl(_INTERNVIT_300M, 3072, 8192, 32, 32, 32, 32020),
    "internvl2-8b": _internvl(_INTERNVIT_300M, 4096, 14336, 32, 32, 8, 92553),
    "internvl2-26b": _internvl(_INTERNVIT_6B, 6144, 16384, 48, 48, 8, 92553),
}


def known() -> list[str]:
    """All names of shapes."""
    return [*llava.NAMED, *NAMED]


def read_shape(
    source: str, dtype: str = "float16", pixels: tuple[int, int] | None = None, is_path: bool = False
) -> ModelShape:
    """A shape by its name, or from a config.json or its folder, of LLaVA or of one of the families here.

    Parameters
    ----------
    source : str
        A name of `known()`, or a path.
    dtype : str
        Of the cache, a key of `DTYPE_BYTES`.
    pixels : tuple of int, optional
        Width and height of an image as the processor hands it over, for models that take any size.
    is_path : bool
        Whether it is a path even if a shape has that name.

    Raises
    ------
    ValueError
        If there is no such shape, or its images cannot have this size.
    """
    config = None if is_path else NAMED.get(source)
    if is_path:
        path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        config = read_json(path, most=1 << 24) if path.is_file() else None
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if kind in FAMILIES:
        return _sized(_of_family(source, config, dtype), pixels)
    if not is_path and source not in llava.NAMED:
        raise ValueError(f"model is {source!r}: it must be {', '.join(known())}, a config.json or a folder with one")
    shape = (ModelShape.from_config if is_path else ModelShape.named)(source, dtype=dtype)
    return _sized(shape, pixels)


def _of_family(source: str, config: Mapping[str, Any], dtype: str) -> ModelShape:
    """Numbers are those of a configuration; what one leaves out is said by name."""
    sizes_of, theirs = FAMILIES[config["model_type"]]
    try:
        sizes = sizes_of(_with_defaults(theirs, config))
        return ModelShape(name=Path(source).name or source, dtype_bytes=DTYPE_BYTES[dtype], **sizes)
    except KeyError as error:
        raise ValueError(f"{source}: has no {error.args[0]}") from None
    except (TypeError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(f"{source}: its sizes are not numbers ({error})") from None


def _with_defaults(theirs: str | None, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration with what it leaves out, by transformers' class of this name."""
    if theirs is None:
        return config
    filled = llava.filled(getattr(import_module("transformers"), theirs), config)
    parts = {name: getattr(filled, name).to_dict() for name in ("vision_config", "text_config")}
    return {**filled.to_dict(), **parts}


def _sized(shape: ModelShape, pixels: tuple[int, int] | None) -> ModelShape:
    """The same model on images of another size."""
    if pixels is None or shape.tiles is not None:  # these are cut into tiles whatever their size
        return shape
    if shape.vision_cls:
        raise ValueError(
            f"image_size: {shape.name} takes images of {shape.image_size} x {shape.image_size} pixels only, it "
            "cuts none into tiles"
        )
    unit = shape.patch_size * shape.merge
    if any(side < unit or side % unit for side in pixels):
        raise ValueError(f"image_size is {pixels[0]}x{pixels[1]}: both must be multiples of {unit} pixels")
    width, height = pixels
    return replace(shape, grid=(height // shape.patch_size, width // shape.patch_size))


def _decoder(text: Mapping[str, Any]) -> dict[str, int]:
    heads = text["num_attention_heads"]
    return {
        "hidden": text["hidden_size"],
        "layers": text["num_hidden_layers"],
        "heads": heads,
        "kv_heads": text.get("num_key_value_heads") or heads,
        "head_dim": text.get("head_dim") or text["hidden_size"] // heads,
        "mlp": text["intermediate_size"],
        "vocab": text["vocab_size"],
    }


def _qwen(config: Mapping[str, Any], width: int, mlp: int, **more: Any) -> dict[str, Any]:
    """What the towers of Qwen have in common: no CLS, patches of two frames, a merger of two linear layers."""
    vision, decoder = config["vision_config"], _decoder(config["text_config"])
    merge, patch = vision["spatial_merge_size"], vision["patch_size"]
    side = DEFAULT_PIXELS // (patch * merge) * merge
    unit = width * merge**2
    return {
        "image_size": side * patch,
        "patch_size": patch,
        "vision_hidden": width,
        "vision_layers": vision["depth"],
        "vision_heads": vision["num_heads"],
        "vision_mlp": mlp,
        "vision_cls": False,
        "feature_cls": False,
        "projector_type": "merger",
        "projector_widths": (unit, unit, decoder["hidden"]),
        "grid": (side, side),
        "merge": merge,
        "frames": vision["temporal_patch_size"],
        **decoder,
        **more,
    }


def _qwen2_vl(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = config["vision_config"]
    return _qwen(config, vision["embed_dim"], int(vision["embed_dim"] * vision["mlp_ratio"]))


def _qwen2_5_vl(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = config["vision_config"]
    unit = vision["patch_size"] * vision["spatial_merge_size"]
    return _qwen(
        config,
        vision["hidden_size"],
        vision["intermediate_size"],
        vision_products=3,
        vision_window=vision["window_size"] // unit,
        vision_full_blocks=tuple(vision["fullatt_block_indexes"]),
    )


def _qwen3_vl(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = config["vision_config"]
    return _qwen(
        config, vision["hidden_size"], vision["intermediate_size"], deepstack=len(vision["deepstack_visual_indexes"])
    )


def _internvl_shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """Tiles of one size with CLS; a pixel shuffle and a projector of two linear layers."""
    vision, decoder = config["vision_config"], _decoder(config.get("llm_config") or config["text_config"])
    size, patch = (side if isinstance(side, int) else side[0] for side in (vision["image_size"], vision["patch_size"]))
    merge = round(1 / config.get("downsample_ratio", 0.5))
    layer = config.get("select_layer", config.get("vision_feature_layer", -1))
    return {
        "image_size": size,
        "patch_size": patch,
        "vision_hidden": vision["hidden_size"],
        "vision_layers": layer % (vision["num_hidden_layers"] + 1),
        "vision_heads": vision["num_attention_heads"],
        "vision_mlp": vision["intermediate_size"],
        "vision_cls": True,
        "feature_cls": False,
        "projector_type": "mlp1",
        "projector_widths": (vision["hidden_size"] * merge**2, decoder["hidden"], decoder["hidden"]),
        "merge": merge,
        **decoder,
    }


FAMILIES: dict[str, tuple[Callable[[Mapping[str, Any]], dict[str, Any]], str | None]] = {
    "qwen2_vl": (_qwen2_vl, "Qwen2VLConfig"),
    "qwen2_5_vl": (_qwen2_5_vl, "Qwen2_5_VLConfig"),
    "qwen3_vl": (_qwen3_vl, "Qwen3VLConfig"),
    "internvl": (_internvl_shape, "InternVLConfig"),
    "internvl_chat": (_internvl_shape, None),
}
"""`model_type` of a configuration -> what it says about sizes, and transformers' class, if there is one."""
