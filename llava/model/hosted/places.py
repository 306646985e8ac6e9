"""Where the images of a batch of prompts stand, worked out on the host from ids and layouts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.model.hosted.layout import Layout


@dataclass
class Places:
    """Where the images of a batch of prompts stand; images are numbered as the towers were given them.

    Attributes
    ----------
    shape : (prompts, length)
        Of the ids.
    image, extra, row, column, group : int64 `[prompts, length]`
        Of every position: its image's number in the prompt (-1 for text and extras), the same for extras alone, its
        place on the image's grid, and the group whose patches an extra stays with (-1 for text).
    valid : bool `[prompts, length]`
        False for padding.
    instruction : bool `[prompts, length]`
        Text after a prompt's first image.
    columns : int64 `[images, slots]`
        Position of every slot in the flattened batch; `prompts * length` for padding.
    middle : int64 `[images, slots]`
        Row of the towers' output and patch that each slot shows, `row * patches + patch`; 0 for padding.
    slot : int64 `[views, patches]`
        Slot of its image that shows each patch of the towers' rows, -1 where none does; as many patches as the largest
        view has.
    image_of_view : int64 `[views]`
        Number of the image that a row of the towers belongs to.
    counts : tuple of int
        Slots of each image.
    views : tuple of int
        Rows of the towers' output for each image.
    plain : bool
        Whether slots are the patches of the views, all of them and in their order.
    even : bool
        Whether all views have equally many patches.
    frames : tuple of int
        Frames of each video; 1 for images, tiles or not.
    prompts : list of list of int
        Numbers of each prompt's images, in the order in which the prompt shows them.
    raster : bool
        Whether the slots of every image are neighbours, so that its tokens may change their order.
    """

    shape: tuple[int, int]
    image: Tensor
    extra: Tensor
    row: Tensor
    column: Tensor
    group: Tensor
    valid: Tensor
    instruction: Tensor
    columns: Tensor
    middle: Tensor
    slot: Tensor
    image_of_view: Tensor
    counts: tuple[int, ...]
    views: tuple[int, ...]
    plain: bool
    even: bool
    frames: tuple[int, ...]
    prompts: list[list[int]]
    raster: bool

    @classmethod
    def of(
        cls, ids: Tensor, valid: Tensor | None, layouts: list[tuple[str, Layout]], placeholders: dict[str, int]
    ) -> Places:
        """Find the images in prompts `[prompts, length]` by their placeholders.

        Raises
        ------
        ValueError
            If placeholders and images do not fit each other.
        """
        at, number = _positions(ids, layouts, placeholders)
        parts = [layout for _, layout in layouts]
        prompts, ordinal = _by_prompt(ids.shape, at, number, len(parts))
        views, counts = tuple(layout.views for layout in parts), tuple(int(layout.shows.sum()) for layout in parts)
        told = {name: _told(name, parts) for name in ("view", "patch", "row", "column", "group")}
        shows = told["patch"] >= 0

        def everywhere(values: Tensor, fill: int = -1) -> Tensor:
            return torch.full((ids.numel(),), fill).scatter(0, at, values).view(ids.shape)

        first_view = torch.tensor([0, *accumulate(views)])[number]
        patches = max((layout.slot.shape[1] for layout in parts), default=0)
        slots = [F.pad(layout.slot, (0, patches - layout.slot.shape[1]), value=-1) for layout in parts]
        middle = (first_view + told["view"]) * patches + told["patch"]
        placeholder = everywhere(torch.ones_like(at), 0).bool()
        real = torch.ones_like(placeholder) if valid is None else valid
        groups = int(told["group"].max()) + 1 if parts else 1
        return cls(
            shape=tuple(ids.shape),
            image=everywhere(torch.where(shows, ordinal[number], -1)),
            extra=everywhere(torch.where(shows, -1, ordinal[number])),
            row=everywhere(told["row"]),
            column=everywhere(told["column"]),
            group=everywhere(number * groups + told["group"]),
            valid=real,
            instruction=real & ~placeholder & (placeholder.cumsum(-1) > 0),
            columns=_padded(at[shows], counts, ids.numel()),
            middle=_padded(middle[shows], counts, 0),
            slot=torch.cat(slots) if slots else torch.zeros(0, 0, dtype=torch.long),
            image_of_view=torch.arange(len(parts)).repeat_interleave(torch.tensor(views, dtype=torch.long)),
            counts=counts,
            views=views,
            frames=tuple(layout.views if kind == "video" else 1 for kind, layout in layouts),
            plain=all(layout.plain for layout in parts),
            even=len({layout.slot.shape[1] for layout in parts}) < 2,
            prompts=prompts,
            raster=_one_run_each(at[shows], number[shows]),
        )

    def of_images(self, numbers: list[int]) -> list[int]:
        """The sum over its views for every image, of a number of each view."""
        ends = [0, *accumulate(self.views)]
        return [sum(numbers[start:end]) for start, end in pairwise(ends)]

    @property
    def images(self) -> int:
        """Images of the prompt that has most."""
        return max(map(len, self.prompts), default=0)


def _told(name: str, layouts: list[Layout]) -> Tensor:
    """What all layouts say of their placeholders, one after another."""
    return torch.cat([torch.empty(0, dtype=torch.long), *(getattr(layout, name) for layout in layouts)])


def _positions(ids: Tensor, layouts: list[tuple[str, Layout]], placeholders: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Positions of all placeholders in the flattened batch, image by image, and their images' numbers."""
    at = [torch.empty(0, dtype=torch.long)] * len(layouts)
    for kind, token in placeholders.items():
        own = [number for number, (of, _) in enumerate(layouts) if of == kind]
        sizes = [len(layouts[number][1].patch) for number in own]
        found = (ids == token).flatten().nonzero()[:, 0]
        if own and len(found) != sum(sizes):
            raise ValueError(
                f"input_ids: got {len(found)} {kind} placeholders, expected {sum(sizes)} for {len(own)} {kind}s "
                f"(of {', '.join(map(str, sizes))})"
            )
        for number, part in zip(own, found.split(sizes) if own else (), strict=True):
            at[number] = part
    number = torch.arange(len(at)).repeat_interleave(torch.tensor([len(part) for part in at], dtype=torch.long))
    return torch.cat(at) if at else torch.empty(0, dtype=torch.long), number


def _by_prompt(shape: tuple[int, int], at: Tensor, number: Tensor, images: int) -> tuple[list[list[int]], Tensor]:
    """Numbers of each prompt's images in their order, and every image's place among its prompt's, int64 `[images]`."""
    first = torch.full((images,), shape[0] * shape[1]).scatter_reduce(0, number, at, "amin")
    last = torch.full((images,), -1).scatter_reduce(0, number, at, "amax")
    prompt = (first // shape[1]).tolist()
    if prompt != (last // shape[1]).tolist():
        raise ValueError("input_ids: the placeholders of an image are spread over two prompts")
    prompts: list[list[int]] = [[] for _ in range(shape[0])]
    ordinal = torch.zeros(images, dtype=torch.long)
    for image in first.argsort().tolist():
        ordinal[image] = len(prompts[prompt[image]])
        prompts[prompt[image]].append(image)
    return prompts, ordinal


def _padded(values: Tensor, counts: tuple[int, ...], fill: int) -> Tensor:
    """Values of images one after another as `[images, slots]`."""
    return pad_sequence(values.split(list(counts)), batch_first=True, padding_value=fill) if counts else values[None]


def _one_run_each(at: Tensor, number: Tensor) -> bool:
    """Whether the positions of every image are neighbours."""
    return bool(((at.diff() == 1) | (number.diff() != 0)).all())
