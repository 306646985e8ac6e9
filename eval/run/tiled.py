"""Which patches of tiles show each place of an image, for drawing what was kept."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

TILED = ("flat", "spatial", "spatial_unpad")
"""Orders of an image's patches: tile after tile; the tiles stitched row by row; the same without the border."""


def tiling(config, size: tuple[int, int], tile_order: str) -> dict | None:
    """How a LLaVA-NeXT cuts an image of a size (width, height) up; None for a model without tiles.

    Returns
    -------
    dict or None
        ``size``; ``grid``, rows and columns of tiles; ``side``, patches of a tile in a row; ``order``, one of `TILED`.
    """
    from llava.anyres import canvases, get_anyres_image_grid_shape

    if getattr(config, "image_aspect_ratio", None) != "anyres":
        return None
    pixels = config.mm_vision_config["image_size"]
    columns, rows = get_anyres_image_grid_shape(size, canvases(config, pixels), pixels)
    flat = "flat" in (tile_order, config.protocol)
    order = "flat" if flat else config.mm_patch_merge_type or "flat"
    side = pixels // config.mm_vision_config["patch_size"]
    return {"size": list(size), "grid": [rows, columns], "side": side, "order": order}


def places(tiles: Mapping) -> np.ndarray:
    """For each place of an image, as tiles show it, the tile's patch, int ``[rows, columns]``."""
    side, (rows, columns) = tiles["side"], tiles["grid"]
    own = np.arange(rows * columns * side**2)
    if tiles["order"] == "flat":
        own = own.reshape(rows, columns, side, side).swapaxes(1, 2)
    own = _without_border(own.reshape(rows * side, columns * side), tiles["size"])
    if tiles["order"] == "spatial_unpad":
        own = np.arange(own.size).reshape(own.shape)
    return own + side**2


def count(tiles: Mapping) -> int:
    """Patches of all tiles and the overview, without the border where the model does not see it."""
    rows, columns = tiles["grid"]
    whole = rows * columns if tiles["order"] != "spatial_unpad" else 0
    return tiles["side"] ** 2 * (1 + whole) if whole else int(places(tiles).size) + tiles["side"] ** 2


def on_image(kept: np.ndarray, tiles: Mapping) -> np.ndarray:
    """Places of which the overview's patch or the tile's is kept, bool ``[rows, columns]``, from bool ``[patches]``."""
    own, side = places(tiles), tiles["side"]
    down, across = (_meets(number, side) for number in own.shape)
    return kept[own] | (down @ kept[: side**2].reshape(side, side) @ across.T)


def _meets(number: int, side: int) -> np.ndarray:
    """Which places along one edge lie on which patches of the overview, bool ``[number, side]``: by either's middle."""
    meets = np.zeros((number, side), dtype=bool)
    meets[np.arange(number), (2 * np.arange(number) + 1) * side // (2 * number)] = True
    meets[(2 * np.arange(side) + 1) * number // (2 * side), np.arange(side)] = True
    return meets


def is_tiling(tiles: object) -> bool:
    """Whether this is what `tiling` returns."""

    def whole(value: object, many: int) -> bool:
        return isinstance(value, list) and len(value) == many and all(type(one) is int and one > 0 for one in value)

    fields = isinstance(tiles, dict) and set(tiles) == {"size", "grid", "side", "order"}
    return fields and whole(tiles["size"], 2) and whole([*tiles["grid"], tiles["side"]], 3) and tiles["order"] in TILED


def _without_border(canvas: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of a canvas that an image of a size (width, height) covers, as LLaVA-NeXT rounds it."""
    import torch
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    width, height = size
    return unpad_image(torch.from_numpy(canvas)[None], (height, width))[0].numpy()
