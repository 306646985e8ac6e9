"""Which patches of tiles show each place of an image, for drawing what was kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llava.model.hosted.layout import Layout

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
    shown = _layout(tiles, "spatial_unpad")  # of whatever order: drawn is what the image covers
    own = shown.shows & (shown.view > 0)
    view, patch = shown.view[own], shown.patch[own]
    flat = tiles["order"] == "flat"
    number = view * tiles["side"] ** 2 + patch if flat else _layout(tiles, tiles["order"]).slot[view, patch]
    return number.view(-1, int(shown.column[own].max()) + 1).numpy()


def count(tiles: Mapping) -> int:
    """Patches of all tiles and the overview, without the border where the model does not see it."""
    if tiles["order"] == "spatial_unpad":
        return int(_layout(tiles, tiles["order"]).shows.sum())
    rows, columns = tiles["grid"]
    return tiles["side"] ** 2 * (1 + rows * columns)


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


def _layout(tiles: Mapping, order: str) -> Layout:
    """The model's own layout of the image."""
    from llava.model.stitched import layout_of

    return layout_of(order, tuple(tiles["size"]), tuple(tiles["grid"]), tiles["side"])
