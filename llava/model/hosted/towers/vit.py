"""CLIP and SigLIP towers of transformers, run by our loop over their blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from mustdrop.hooks import ForwardState, VisionTokens


def run_tower(
    tower: CLIPVisionTower, pixels: Tensor, state: ForwardState, views: Sequence[int] | None = None
) -> tuple[VisionTokens, Tensor]:
    """What is left of the views, and the states in full layout that the stock code goes on with.

    `pixels` `[rows, 3, height, width]`, of which `views` neighbouring ones show one image each; the states are
    `[rows, prefix + patches, width]`.
    """
    with state.timed("vision", pixels.device):
        tokens = tower.encode(pixels, state, views)
        return tokens, full_layout(tokens)


def one_below_the_other(
    first: dict[int, Tensor], second: dict[int, Tensor], both: Sequence[Tensor]
) -> dict[int, Tensor]:
    """What two calls of towers noted after blocks, as of one call: an image's and a video's, in one prompt.

    `first` and `second` are the maps `patch_to_token` `[rows, patches]` by block, `both` those of the two calls' ends,
    for their shapes. A call that changed nothing at a block still stands there as it stood before.
    """
    stands = [torch.arange(end.shape[1], device=end.device).expand_as(end) for end in both]
    found = {}
    for block in sorted({*first, *second}):
        stands = [own.get(block, before) for own, before in zip((first, second), stands, strict=True)]
        found[block] = torch.cat([stands[0].to(stands[1].device), stands[1]])
    return found


def full_layout(tokens: VisionTokens) -> Tensor:
    """A state for every patch, `[views, prefix + patches, width]`.

    A token's own patch has its state, a merged one that of the token it went into; what was dropped has that of the
    nearest token on the grid, so that packing which blends neighbours blends tokens that are there.
    """
    if untouched(tokens):
        return tokens.hidden
    column = tokens.patch_to_token
    column = torch.where(column < 0, _nearest(tokens), column)
    own = placed(tokens)
    column = torch.where(own < 0, column, own)
    prefix = torch.arange(tokens.prefix, device=column.device).expand(len(column), -1)
    column = torch.cat([prefix, column + tokens.prefix], dim=1)
    return tokens.hidden.gather(1, column[..., None].expand(-1, -1, tokens.hidden.shape[-1]))


def untouched(tokens: VisionTokens) -> bool:
    """Whether no token has been dropped, merged or moved: the tokens are the patches."""
    return tokens.lengths is None and tokens.valid is None


def placed(tokens: VisionTokens) -> Tensor:
    """For every patch the column of the token that sits on it, int64 `[views, patches]`, -1 for none."""
    patches = tokens.patch_to_token.shape[1]
    place = tokens.patch_index if tokens.valid is None else tokens.patch_index.masked_fill(~tokens.valid, patches)
    column = torch.arange(place.shape[1], device=place.device).expand_as(place)
    return place.new_full((len(place), patches + 1), -1).scatter(1, place, column)[:, :patches]


def _nearest(tokens: VisionTokens) -> Tensor:
    """For every patch the column of the token that sits nearest to it, int64 `[views, patches]`."""
    across = tokens.grid[1]
    patch = torch.arange(tokens.patch_to_token.shape[1], device=tokens.hidden.device)

    def apart(of: Tensor, at: Tensor) -> Tensor:
        return (of[:, None] - at[:, None, :]).square()

    place = tokens.patch_index
    distance = apart(patch // across, place // across) + apart(patch % across, place % across)
    if tokens.valid is not None:
        distance = distance.masked_fill(~tokens.valid[:, None], torch.iinfo(distance.dtype).max)
    return distance.argmin(-1)
