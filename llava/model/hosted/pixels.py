"""Smaller images for models that take any size: their processor makes them, within a budget of pixels or of tiles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from transformers import ProcessorMixin

from llava.model.hosted.layout import Layout
from mustdrop.hooks import Reducer


def limited(processor: ProcessorMixin, reducer: Reducer) -> ProcessorMixin:
    """The processor that makes images as small as `smallimage`, alone or among others, wants them; else the same one.

    A Qwen-VL's gets another `max_pixels` (`size["longest_edge"]`), an InternVL's fewer tiles (`max_patches`). The sizes
    of videos stay as they are.

    Raises
    ------
    ValueError
        In one line, if the processor has no such budget, or `retain` is below its smallest image.
    """
    budget = budget_of(reducer)
    if budget is None:
        return processor
    processor = copy.copy(processor)
    processor.image_processor = images = copy.copy(processor.image_processor)
    if hasattr(images, "merge_size"):
        pixels = budget(1) * (images.patch_size * images.merge_size) ** 2
        least, most = (images.size[name] for name in ("shortest_edge", "longest_edge"))
        images.size = {"shortest_edge": min(least, pixels), "longest_edge": min(most, pixels)}
    elif hasattr(images, "crop_to_patches") and hasattr(processor, "image_seq_length"):
        most = images.max_patches if images.crop_to_patches else 1
        images.max_patches = most_tiles(most, processor.image_seq_length, budget)
        images.min_patches = min(images.min_patches, images.max_patches)
    else:
        raise ValueError(f"method: smallimage needs a budget of pixels, which {type(processor).__name__} has not")
    return processor


def most_tiles(most: int, each: int, budget: Callable[[int], int]) -> int:
    """Tiles of an image, `most` at most and no thumbnail counted, that keep its budget with `each` tokens a tile."""
    fits = [tiles for tiles in range(1, most + 1) if (views := tiles + (tiles > 1)) * each <= budget(views)]
    if not fits:
        raise ValueError(f"retain is {budget(1)}: it must be at least {each}, the tokens of one tile")
    return max(fits)


def check_budget(reducer: Reducer, layouts: Sequence[tuple[str, Layout]]) -> None:
    """Raise ValueError for an image or video of more tokens than a reducer has the processor make of it.

    One unit high or wide it may be longer: there is no smaller one of its shape.
    """
    budget = budget_of(reducer)
    for kind, layout in layouts if budget is not None else ():
        tokens, most = int(layout.shows.sum()), budget(layout.views)
        if tokens > most and not layout.strip:
            how = "frames of another size" if kind == "video" else "llava.model.hosted.pixels.limited"
            raise ValueError(
                f"retain is {most}: it must be {tokens} or more for the {kind} that was given, which the processor "
                f"makes smaller for smallimage: {how}"
            )


def budget_of(reducer: Reducer) -> Callable[[int], int] | None:
    """Tokens that an image of so many views may have at most; None where no reducer sets that."""
    parts = [part for part in reducer.asked_at("on_pixels") if part.pixel_budget(1) is not None]
    return (lambda views: min(part.pixel_budget(views) for part in parts)) if parts else None
