"""Pure tensor functions of the methods: no model, no state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor


def cut_windows(patches: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Non-overlapping windows of a patch grid, `[images, patches, width]` -> `[images, windows, window^2, width]`.

    Windows start at the top left corner; a rim that the window does not divide belongs to none.
    """
    rows, columns = (side // window * window for side in grid)
    on_grid = rearrange(patches, "i (h w) d -> i h w d", h=grid[0])[:, :rows, :columns]
    return rearrange(on_grid, "i (h a) (w b) d -> i (h w) (a b) d", a=window, b=window)


def window_similarity(patches: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Mean cosine similarity of the ordered pairs of different tokens in each window (MustDrop, section 3.2).

    The pairs are never formed: the squared length of the sum of n unit vectors is n plus the sum over these pairs.

    Parameters
    ----------
    patches : `[images, patches, width]`
        One token per patch, in raster order.
    grid : (rows, columns)
    window : int
        Side of a window.

    Returns
    -------
    float32 `[images, windows]`
    """
    units = F.normalize(cut_windows(patches.float(), grid, window), dim=-1)
    count = window * window
    return (reduce(units, "i w n d -> i w d", "sum").square().sum(-1) - count) / (count * (count - 1))


def redundancy(features: Tensor, valid: Tensor | None = None, first: Tensor | None = None) -> Tensor:
    """How much a token repeats tokens before it, for all tokens in one step: no token waits for another.

    Tokens are put in order, the least similar to all others in front. A token is as redundant as its largest cosine
    similarity to a token before it, so that of similar tokens the first one counts as new.

    Parameters
    ----------
    features : `[images, tokens, width]`
    valid : bool `[images, tokens]`, optional
        False for padding, which repeats most.
    first : bool `[images, tokens]`, optional
        True for tokens that stand in front of all others and repeat least.

    Returns
    -------
    float32 `[images, tokens]`
    """
    units = F.normalize(features.float(), dim=-1)
    similarity = units @ units.transpose(1, 2)
    to_all = (similarity if valid is None else similarity.masked_fill(~valid[:, None], 0)).sum(-1)
    if first is not None:
        to_all = to_all.masked_fill(first, float("-inf"))
    if valid is not None:
        to_all = to_all.masked_fill(~valid, float("inf"))
    # The order is a mask over pairs instead of a loop: a token looks only at those of a smaller place.
    place = to_all.argsort(dim=-1, stable=True).argsort(-1)
    redundancy = similarity.masked_fill(place[:, None] >= place[..., None], -2).amax(-1)
    if first is not None:
        redundancy = redundancy.masked_fill(first, -3)
    return redundancy if valid is None else redundancy.masked_fill(~valid, 2)


def dual_attention_keep(
    attention: Tensor, image: Tensor, images: int, global_threshold: float, individual_threshold: float
) -> Tensor:
    """MustDrop's dual-attention filter (section 3.3): which tokens the text attends to.

    A vision token goes if its share of the attention that the text pays to its image is below the global threshold
    and no single text token pays it as much as the individual threshold.

    Parameters
    ----------
    attention : `[batch, rows, length]`
        Attention of the text rows, mean over heads; zero in rows that are padding.
    image : int64 `[batch, length]`
        The image each column belongs to, -1 for text.
    images : int
        Largest number of images in a prompt.
    global_threshold, individual_threshold : float
        Relative to the sum over the image, and absolute.

    Returns
    -------
    bool `[batch, length]`
        True for tokens to keep, among them all text.
    """
    vision = image >= 0
    total, strongest = attention.sum(1), attention.amax(1)
    on_image = total.new_zeros(len(total), images).scatter_add(1, image.clamp(min=0), total * vision)
    small_share = total < global_threshold * on_image.gather(1, image.clamp(min=0))
    return ~(vision & small_share & (strongest < individual_threshold))


def of_each_image(image: Tensor, images: int) -> Tensor:
    """Which columns belong to each image, bool `[batch, images, length]`, from the image of every column (-1: text)."""
    return image[:, None] == torch.arange(images, device=image.device)[:, None]


def tokens_per_image(image: Tensor, images: int) -> Tensor:
    """Number of vision tokens of each image, int64 `[batch, images]`, from the image of every column (-1: text)."""
    return of_each_image(image, images).sum(-1)


def top_per_image(score: Tensor, image: Tensor, wanted: Tensor) -> Tensor:
    """Mark the best vision tokens of every image.

    Parameters
    ----------
    score : `[batch, length]`
    image : int64 `[batch, length]`
        The image each column belongs to, -1 for text.
    wanted : int64 `[batch, images]`
        Tokens to keep of each image.

    Returns
    -------
    bool `[batch, length]`
    """
    own = of_each_image(image, wanted.shape[1])
    rank = score[:, None].masked_fill(~own, float("-inf")).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (own & (rank < wanted[..., None])).any(1)


def top_count(score: Tensor, count: int | Tensor) -> Tensor:
    """Mark the `count` best entries of each row, bool like `score` `[rows, entries]`; `[rows, 1]` for each its own."""
    return score.argsort(dim=-1, descending=True, stable=True).argsort(-1) < count


def largest(score: Tensor, mask: Tensor, count: int) -> Tensor:
    """Columns of the largest entries of a mask, int64 `[..., count]`, others behind; fewer if there are no more."""
    return score.masked_fill(~mask, float("-inf")).topk(min(count, score.shape[-1])).indices


def in_turns(similarity: Tensor, shares: Tensor, own: Tensor, taken: Tensor) -> Tensor:
    """Let pivots take their shares one after the other, of what is left the tokens least similar to them (DART).

    Parameters
    ----------
    similarity : `[batch, images, pivots, length]`
    shares : int64 `[batch, images, pivots]`
        Tokens that each pivot takes.
    own, taken : bool `[batch, images, length]`
        Tokens of the image, and those that are taken before.

    Returns
    -------
    bool `[batch, images, length]`
        All that are taken.
    """
    for to_pivot, share in zip(similarity.unbind(-2), shares.unbind(-1), strict=True):
        best = top_count((-to_pivot).masked_fill(~own | taken, float("-inf")), share[..., None])
        taken = taken | (best & own)
    return taken


def set_order(numbers: Tensor, counts: Tensor) -> Tensor:
    """Places `[batch, images, entries]` of the first of some numbers in the order of a Python set, then the others'.

    `counts` `[batch, 1, 1]` says how many come first. Reads from the device.
    """

    def order(row: list[int], count: int) -> list[int]:
        first = [row.index(number) for number in set(row[:count])]
        return first + [place for place in range(len(row)) if place not in first]

    rows = zip(numbers.tolist(), counts.flatten().tolist(), strict=True)
    return torch.tensor([[order(row, count) for row in own] for own, count in rows], device=numbers.device)


def for_rows(count: int | Sequence[int], device: torch.device) -> tuple[int, int | Tensor]:
    """The largest of some rows' numbers, and all of them: int64 `[rows, 1]`, or one where they are equal."""
    if isinstance(count, int):
        return count, count
    return max(count), count[0] if len(set(count)) == 1 else torch.tensor(count, device=device)[:, None]


def stretched(score: Tensor, valid: Tensor | None = None) -> Tensor:
    """A score `[rows, tokens]` stretched from 0 to 1 in every row (CDPruner, section 3.2); 1 if all are equal."""
    infinite = torch.full_like(score, float("inf"))
    low = (score if valid is None else torch.where(valid, score, infinite)).amin(-1, keepdim=True)
    high = (score if valid is None else torch.where(valid, score, -infinite)).amax(-1, keepdim=True)
    return torch.where(high > low, (score - low + 1e-6) / (high - low), 1.0)


def grid_cells(grid: tuple[int, int], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cut a patch grid into exactly `count` cells of nearly the same size and shape.

    Bands of rows are cut into cells independently, so that any count from 1 to the number of patches is possible.

    Returns
    -------
    cell : int64 `[patches]`
        The cell of every patch.
    middle : int64 `[count]`
        The patch in the middle of every cell.
    """
    rows, columns = grid
    bands = min(max(round((count * rows / columns) ** 0.5), -(-count // columns)), rows, count)
    band = torch.arange(bands, device=device)
    first = (band * count + bands - 1) // bands
    in_band = ((band + 1) * count + bands - 1) // bands - first
    row, column = (axis.reshape(-1) for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    row, column = row.to(device), column.to(device)
    of_row = row * bands // rows
    cell = first[of_row] + column * in_band[of_row] // columns
    number = torch.arange(count, device=device)
    own = torch.searchsorted(first, number, right=True) - 1
    middle_row = _middle(own, bands, rows)
    return cell, middle_row * columns + _middle(number - first[own], in_band[own], columns)


def _middle(part: Tensor, parts: int | Tensor, length: int) -> Tensor:
    """Middle number of those n below `length` with n * parts // length == part."""
    first, end = ((number * length + parts - 1) // parts for number in (part, part + 1))
    return (first + end - 1) // 2


def layer_index(layer: int | float, layers: int) -> int:
    """A decoder layer given by number, from the end if negative, or (a float) as a fraction of the depth."""
    return int(layer * layers) if isinstance(layer, float) else layer % layers
