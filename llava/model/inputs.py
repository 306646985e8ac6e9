"""Ids and images of a batch of prompts, looked over and put beside each other before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX


def split_at_images(row: list[int]) -> list[list[int]]:
    """Text ids before, between and after the image tokens: one chunk more than there are images."""
    chunks: list[list[int]] = [[]]
    for token in row:
        if token == IMAGE_TOKEN_INDEX:
            chunks.append([])
        else:
            chunks[-1].append(token)
    return chunks


def text_ids(chunks: list[list[list[int]]], vocabulary: int) -> Tensor:
    """All text ids of all prompts, int64 `[tokens]`; ValueError if there is none such."""
    ids = torch.tensor([i for row in chunks for chunk in row for i in chunk], dtype=torch.long)
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if len(wrong):
        raise ValueError(
            f"input_ids: got {wrong[0]}, expected ids from 0 to {vocabulary - 1}, or {IMAGE_TOKEN_INDEX} for an image"
        )
    return ids


def image_stacks(images: Tensor | list[Tensor] | None) -> list[Tensor]:
    """Images as stacks of tiles `[tiles, 3, height, width]`, one tile for a plain image.

    Raises ValueError if they are something else, or not of one size.
    """
    stacks = []
    for image in () if images is None else images:
        if not isinstance(image, Tensor):
            kind = type(image).__name__
            raise ValueError(f"images: got {kind}, expected tensors as process_images of llava.mm_utils makes them")
        stack = image if image.dim() == 4 else image[None]
        if stack.dim() != 4 or stack.shape[1] != 3 or 0 in stack.shape:
            found = list(image.shape)
            raise ValueError(
                f"images: got one of shape {found}, expected [3, height, width] or [tiles, 3, height, width]"
            )
        stacks.append(stack)
    sizes = {tuple(stack.shape[-2:]) for stack in stacks}
    if len(sizes) > 1:
        raise ValueError(
            f"images: got sizes {sorted(sizes)} in one batch, expected one; process_images makes them equal"
        )
    return stacks


def distinct_stacks(stacks: list[Tensor], used: list[int]) -> tuple[list[Tensor], dict[int, int]]:
    """The different stacks among the used ones, and for each used number which of these it is."""
    places: dict[tuple, int] = {}
    distinct, which = [], {}
    for number in used:
        stack = stacks[number]
        memory = stack.device, stack.data_ptr(), stack.shape, stack.stride()
        if memory not in places:
            places[memory] = len(distinct)
            distinct.append(stack)
        which[number] = places[memory]
    return distinct, which


def assign_images(images: int, wanted: list[int]) -> list[list[int]]:
    """Which images belong to which prompt; a text-only prompt may bring one dummy, as in LLaVA's training batches."""
    for taken in (wanted, [max(count, 1) for count in wanted]):
        if images == sum(taken):
            starts = [sum(taken[:i]) for i in range(len(taken))]
            return [list(range(start, start + count)) for start, count in zip(starts, wanted, strict=True)]
    raise ValueError(f"images: got {images}, but the prompts have {sum(wanted)} <image> tokens ({wanted} per prompt)")
