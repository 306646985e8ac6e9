"""Where the tokens that a vision tower left sit."""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop.hooks import VisionTokens


def untouched(tokens: VisionTokens) -> bool:
    """Whether no token has been dropped, merged or moved: the tokens are the patches."""
    return tokens.lengths is None and tokens.valid is None


def placed(tokens: VisionTokens) -> Tensor:
    """For every patch the column of the token that sits on it, int64 `[views, patches]`, -1 for none."""
    patches = tokens.patch_to_token.shape[1]
    place = tokens.patch_index if tokens.valid is None else tokens.patch_index.masked_fill(~tokens.valid, patches)
    column = torch.arange(place.shape[1], device=place.device).expand_as(place)
    return place.new_full((len(place), patches + 1), -1).scatter(1, place, column)[:, :patches]
