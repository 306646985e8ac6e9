"""Images as LLaVA-NeXT has them in LLaVA's own format: an overview, then the tiles stitched row by row.

What a row of patches across tiles shows comes one after another, with a newline behind it; the border that the image
does not reach (`spatial_unpad`) is cut off. The prompt is first laid out in full, as stock models have theirs, and what
the vision tower dropped leaves at the same door.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.llava_next.modeling_llava_next import unpad_image

from llava.anyres import canvases, get_anyres_image_grid_shape
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.hosted.base import TowerRun
from llava.model.hosted.door import Arrival, enter
from llava.model.hosted.layout import EXTRA, Layout, tiles
from llava.model.hosted.tokens import placed, untouched
from llava.model.masks import labels_of
from mustdrop.hooks import ForwardState, Tokens, VisionTokens, gather

MERGE_TYPES = "flat", "spatial", "spatial_unpad"
"""`mm_patch_merge_type`: tile after tile, stitched, or stitched without the border and with newlines."""


def has_newline(config) -> bool:
    """Whether a model of this configuration has a newline token (`model.image_newline`)."""
    return getattr(config, "mm_patch_merge_type", None) == "spatial_unpad"


def stitches(config, images: Tensor | list[Tensor]) -> bool:
    """Whether images are stitched: as in LLaVA, a plain tensor `[images, 3, height, width]` is not."""
    if getattr(config, "mm_patch_merge_type", None) in (None, "flat") or config.protocol == "flat":
        return False
    return not isinstance(images, Tensor) or images.dim() == 5


def sizes_of(image_sizes: Sequence | Tensor | None, stacks: list[Tensor]) -> list[tuple[int, int] | None]:
    """Width and height of every image in pixels, None where they are left out.

    Raises
    ------
    ValueError
        If they do not fit the images.
    """
    if image_sizes is None:
        return [None] * len(stacks)
    sizes = torch.as_tensor(image_sizes).tolist()
    right = all(isinstance(size, list) and len(size) == 2 and min(size) > 0 for size in sizes)
    if len(sizes) != len(stacks) or not right:
        raise ValueError(f"image_sizes: got {image_sizes}, expected (width, height) of each of {len(stacks)} images")
    return [tuple(map(int, size)) for size in sizes]


def check_sizes(config, images: Sequence[tuple[int, tuple[int, int] | None]]) -> None:
    """Raise ValueError if an image in tiles, given as its number of views and its size, has no size."""
    in_tiles = getattr(config, "image_aspect_ratio", None) == "anyres"
    if in_tiles and any(views > 1 and size is None for views, size in images):
        raise ValueError("image_sizes: left out, this method orders tiles by the (width, height) of each image")


def tile_grid(config, views: int, size: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of the tiles of an image of so many views and a size (width, height); (0, 0) of a single view.

    Raises
    ------
    ValueError
        If an image of that size is not cut into so many tiles.
    """
    if views == 1:
        return 0, 0
    if size is None:
        raise ValueError("image_sizes: left out, tiles are stitched by the (width, height) of each image")
    pixels = config.mm_vision_config["image_size"]
    grid = get_anyres_image_grid_shape(size, canvases(config, pixels), pixels)
    columns, rows = grid
    if views != 1 + columns * rows:
        raise ValueError(
            f"image_sizes: got {size[0]} x {size[1]} for {views} views, image_grid_pinpoints cut such an image into "
            f"an overview and {columns} x {rows} tiles"
        )
    return rows, columns


def tile_grids(config, images: Sequence[tuple[int, tuple[int, int] | None]]) -> list[tuple[int, int] | None] | None:
    """Rows and columns of the tiles of each image, None where that is not known: it is in views of another kind."""
    if getattr(config, "image_aspect_ratio", None) != "anyres" or all(size is None for _, size in images):
        return None
    return [tile_grid(config, views, size) if views > 1 and size else None for views, size in images]


def layouts_of(config, side: int, images: Sequence[tuple[int, tuple[int, int] | None]]) -> list[Layout]:
    """The layout of every image, given as its number of views, `side` x `side` patches each, and its size."""
    merge = config.mm_patch_merge_type
    return [
        layout_of(merge, size if views > 1 else None, tile_grid(config, views, size), side) for views, size in images
    ]


@lru_cache(maxsize=64)
def layout_of(merge: str, size: tuple[int, int] | None, grid: tuple[int, int], side: int) -> Layout:
    """The layout of an image of a size (width, height) in `grid` (rows, columns) tiles of `side` x `side` patches."""
    rows, columns = grid
    views = 1 + columns * rows
    overview, *rest = torch.arange(views * side * side).view(views, side, side)
    packed = [overview.flatten()]
    if rest:
        whole = rearrange(torch.stack(rest), "(r c) h w -> (r h) (c w)", r=rows)
        if merge == "spatial_unpad":
            width, height = size
            whole = unpad_image(whole[None], (height, width))[0]
        packed.append(F.pad(whole, (0, 1), value=EXTRA).flatten())
    else:
        packed.append(torch.tensor([EXTRA]))
    layout = tiles(torch.cat(packed), views, side)
    return layout if merge == "spatial_unpad" else layout.without_extras()


@dataclass
class TiledImages:
    """The images of a batch of prompts, one after another.

    `tokens` are the projected ones, a row for each view that was encoded; `rows` are those of each image, of which
    several may show the same; `layouts` one for each image.
    """

    tokens: VisionTokens
    rows: list[list[int]]
    layouts: list[Layout]

    @classmethod
    def of(cls, config, tokens: VisionTokens, views: list[int], shown: list[tuple[int, tuple | None]]) -> TiledImages:
        """The images of which each shows a stack of `views`, by the stack's number, and has a size (width, height)."""
        first = [0, *accumulate(views)]
        rows = [list(range(first[number], first[number + 1])) for number, _ in shown]
        sizes = [(views[number], size) for number, size in shown]
        return cls(tokens, rows, layouts_of(config, tokens.grid[0], sizes))

    @property
    def order(self) -> list[int]:
        """Rows of all images."""
        return [row for image in self.rows for row in image]


def splice_stitched(
    ids: list[list[int]],
    text: Tensor,
    labels: list[Tensor] | None,
    images: TiledImages,
    newline: Tensor | None,
    state: ForwardState,
    padding_side: str,
    limit: int | None = None,
) -> tuple[Tensor, Tokens, Tensor | None, int]:
    """Prompts with their images in place, without what was dropped.

    Parameters
    ----------
    ids : list of list of int
        Of every prompt, `IMAGE_TOKEN_INDEX` where an image goes.
    text : `[tokens, width]`
        Embeddings of all others, one prompt after another.
    labels : list of int64 `[length]`, optional
        Targets for `ids`.
    images : TiledImages
        The images.
    newline : `[width]`, optional
        What stands at the end of a row.
    state : ForwardState
        The forward pass.
    padding_side, limit
        As in `splice`.

    Returns
    -------
    tuple
        Embeddings `[prompts, length, width]`, the record of their positions, labels, and the positions that the longest
        prompt takes.
    """
    repeats = _repeats(ids, [len(layout.patch) for layout in images.layouts])
    full, valid = _padded([torch.tensor(row) for row in ids], repeats, padding_side)
    real = torch.ones_like(full, dtype=torch.bool) if valid is None else valid
    shows = (full == IMAGE_TOKEN_INDEX) & real
    order = images.order
    shared = order != list(range(len(order)))
    encoded = images.tokens.rows(order) if shared else images.tokens
    embeds = text.new_zeros(full.numel(), text.shape[-1])
    for where, what in ((real & ~shows, text), (shows, _placeholders(encoded, images.layouts, newline))):
        embeds = embeds.index_copy(0, where.flatten().nonzero()[:, 0].to(text.device), what.to(text))
    if shared:
        _pick(state, order, encoded.device)
    position = (real.cumsum(-1) - 1).clamp(min=0).to(text.device)
    layouts = [("image", layout) for layout in images.layouts]
    maps, state.vision = state.vision, {}
    arrival = Arrival(state, full, {"image": IMAGE_TOKEN_INDEX}, layouts, [TowerRun.of(encoded, maps)])
    embeds, tokens = enter(arrival, embeds.view(*full.shape, -1), valid, position)
    if shared:  # the record speaks of what was encoded
        _pick(state, [order.index(row) for row in range(len(images.tokens.patch_index))], encoded.device)
        state.views[:] = [[[order[row] for row in image] for image in own] for own in state.views]
    longest = int(real.sum(-1).max()) if state.reducer.positions == "original" else embeds.shape[1]
    targets = None
    if labels is not None:
        targets, _ = _padded([own.cpu() for own in labels], repeats, padding_side, IGNORE_INDEX)
        targets = targets.masked_fill(shows, IGNORE_INDEX).to(text.device)
        embeds, tokens, targets = _trained_on(embeds, tokens, targets, limit)
    return embeds, tokens, targets, longest if limit is None else min(longest, limit)


def _pick(state: ForwardState, rows: list[int], device: torch.device) -> None:
    """Let what is noted of the vision tower be that of these rows."""
    index = torch.tensor(rows, device=device)
    for noted in (state.vision, state.encoded):
        noted.update({block: stands[index] for block, stands in noted.items()})


def _repeats(rows: list[list[int]], counts: list[int]) -> list[Tensor]:
    """How many positions each id of each prompt takes, of which an image takes `counts`, in their order."""
    left = iter(counts)
    return [torch.tensor([next(left) if one == IMAGE_TOKEN_INDEX else 1 for one in row]) for row in rows]


def _padded(rows: list[Tensor], repeats: list[Tensor], side: str, fill: int = 0) -> tuple[Tensor, Tensor | None]:
    """Values of every id at each position it takes, `[prompts, length]`, and which are no padding (None: all)."""
    full = [row.repeat_interleave(times) for row, times in zip(rows, repeats, strict=True)]
    values = pad_sequence(full, batch_first=True, padding_value=fill, padding_side=side)
    if len({len(row) for row in full}) == 1:
        return values, None
    ones = [torch.ones_like(row, dtype=torch.bool) for row in full]
    return values, pad_sequence(ones, batch_first=True, padding_side=side)


def _placeholders(encoded: VisionTokens, layouts: list[Layout], newline: Tensor | None) -> Tensor:
    """States of the placeholders of all images, one image after another: `[placeholders, width]`."""
    states = encoded.hidden
    if not untouched(encoded):
        states = gather(states, placed(encoded).clamp(min=0))  # what was dropped has any state, it leaves at the door
    patches = states.shape[1]
    first = accumulate((layout.views * patches for layout in layouts), initial=0)
    index = [
        torch.where(layout.shows, start + layout.view * patches + layout.patch, EXTRA)
        for start, layout in zip(first, layouts, strict=False)
    ]
    states = states.flatten(0, 1)
    if newline is not None:
        states = torch.cat([states, newline.to(states)[None]])
    index = torch.cat(index)
    return states[torch.where(index < 0, len(states) - 1, index).to(states.device)]


def _trained_on(embeds: Tensor, tokens: Tokens, targets: Tensor, limit: int | None) -> tuple[Tensor, Tokens, Tensor]:
    """Prompts cut to a limit, and labels beside their embeddings."""
    if limit is not None and embeds.shape[1] > limit:
        real = torch.ones_like(tokens.image) if tokens.valid is None else tokens.valid
        indices, tokens = tokens.select(real.cumsum(-1) <= limit)
        embeds = gather(embeds, indices)
    targets = labels_of(tokens, targets)
    column = torch.arange(embeds.shape[1], device=embeds.device).repeat(len(embeds), 1)
    return embeds, replace(tokens, original_column=column), targets
