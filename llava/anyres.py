"""Images of any shape as an overview and tiles (LLaVA-NeXT's preprocessing)."""

import ast
import math
from collections.abc import Sequence
from contextlib import suppress

import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.images import load_image


def select_best_resolution(
    original_size: tuple[int, int], possible_resolutions: Sequence[Sequence[int]]
) -> tuple[int, int]:
    """Choose the canvas that keeps most of an image's pixels, and among those the one that wastes least.

    Parameters
    ----------
    original_size : tuple of int
        Width and height of the image in pixels.
    possible_resolutions : sequence of (int, int)
        Widths and heights to choose from, in pixels.

    Returns
    -------
    tuple of int
        Width and height of the chosen canvas; the first of equals.

    Raises
    ------
    ValueError
        If there is nothing to choose from.
    """
    if not possible_resolutions:
        raise ValueError("image_grid_pinpoints: empty, expected a list of [width, height]")
    width, height = original_size

    def merit(resolution: Sequence[int]) -> tuple[int, int]:
        canvas_width, canvas_height = resolution
        scale = min(canvas_width / width, canvas_height / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - canvas_width * canvas_height

    return tuple(max(possible_resolutions, key=merit))


def resize_and_pad_image(image: Image.Image, target_resolution: tuple[int, int]) -> Image.Image:
    """Fit an image into a canvas without changing its shape.

    Parameters
    ----------
    image : PIL.Image.Image
        The image.
    target_resolution : tuple of int
        Width and height of the canvas in pixels.

    Returns
    -------
    PIL.Image.Image
        An RGB canvas with the image in its middle and black borders.
    """
    image = load_image(image)
    width, height = image.size
    target_width, target_height = target_resolution
    if target_width / width < target_height / height:
        size = (target_width, min(math.ceil(height * (target_width / width)), target_height))
    else:
        size = (min(math.ceil(width * (target_height / height)), target_width), target_height)
    canvas = Image.new("RGB", (target_width, target_height), (0, 0, 0))
    canvas.paste(
        image.resize(size, Image.Resampling.BICUBIC),
        ((target_width - size[0]) // 2, (target_height - size[1]) // 2),
    )
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Cut an image into square tiles, row by row.

    Parameters
    ----------
    image : PIL.Image.Image
        The image.
    patch_size : int
        Side of a tile in pixels. Tiles that reach over the border are filled with black.

    Returns
    -------
    list of PIL.Image.Image
        ``ceil(height / patch_size) * ceil(width / patch_size)`` tiles.
    """
    width, height = image.size
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, height, patch_size)
        for left in range(0, width, patch_size)
    ]


def get_anyres_image_grid_shape(
    image_size: tuple[int, int], grid_pinpoints: str | Sequence[Sequence[int]], patch_size: int
) -> tuple[int, int]:
    """Count the tiles that :func:`process_anyres_image` cuts an image into.

    Parameters
    ----------
    image_size : tuple of int
        Width and height of the image in pixels.
    grid_pinpoints : str or sequence of (int, int)
        Widths and heights of the canvases to choose from, or a text that spells such a list.
    patch_size : int
        Side of a tile in pixels.

    Returns
    -------
    tuple of int
        Columns and rows of tiles; the overview that precedes them does not count.
    """
    width, height = select_best_resolution(image_size, parse_grid_pinpoints(grid_pinpoints))
    return width // patch_size, height // patch_size


def canvases(config: object, tile: int) -> list[tuple[int, int]]:
    """Widths and heights in pixels of what images are fitted into and cut up, by a model's configuration.

    ``image_grid_pinpoints``; under ``protocol: flat`` two by two tiles whatever the image, which is what papers mean by
    2880 tokens. ``tile`` is the width of a tile in pixels.
    """
    if getattr(config, "protocol", None) == "flat":
        return [(2 * tile, 2 * tile)]
    return parse_grid_pinpoints(config.image_grid_pinpoints)


def process_anyres_image(
    image: Image.Image, processor: CLIPImageProcessorPil, grid_pinpoints: str | Sequence[Sequence[int]]
) -> torch.Tensor:
    """Turn one image into an overview and tiles, as LLaVA-NeXT does.

    Parameters
    ----------
    image : PIL.Image.Image
        The image.
    processor : CLIPImageProcessorPil
        The vision tower's image processor.
    grid_pinpoints : str or sequence of (int, int)
        Widths and heights of the canvases to choose from, in pixels, or a text that spells such a list.

    Returns
    -------
    torch.Tensor
        ``[1 + tiles, 3, height, width]`` float32, the overview first, then the tiles row by row.

    Raises
    ------
    ValueError
        If ``grid_pinpoints`` is no list of sizes.
    """
    image = load_image(image)
    canvas_size = select_best_resolution(image.size, parse_grid_pinpoints(grid_pinpoints))
    tiles = divide_to_patches(resize_and_pad_image(image, canvas_size), processor.crop_size["height"])
    side = processor.size["shortest_edge"]
    overview = image.resize((side, side), Image.Resampling.BICUBIC)
    return processor([overview, *tiles], return_tensors="pt")["pixel_values"]


def parse_grid_pinpoints(grid_pinpoints: str | Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Widths and heights of canvases in pixels, from a list or a text that spells one; ValueError if it is none."""
    sizes = grid_pinpoints
    if isinstance(sizes, str):
        with suppress(SyntaxError, ValueError):
            sizes = ast.literal_eval(sizes)
    right = isinstance(sizes, list | tuple) and all(
        isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
        for size in sizes
    )
    if not right:
        raise ValueError(f"image_grid_pinpoints: got {grid_pinpoints!r}, expected a list of [width, height]")
    return [tuple(size) for size in sizes]
