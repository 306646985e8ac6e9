"""What methods for videos share: the tokens of every frame at their places, and how many stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop.hooks import Keep, VisionStep, VisionTokens
from mustdrop.methods.retaining import Retaining
from mustdrop.retain import tokens_of


@dataclass
class FrameMethod(Retaining):
    """Base of methods that choose once, after the projector, among the tokens of a video's frames.

    An image is a video of one frame; tiles are taken as frames in their order.

    Parameters
    ----------
    retain : int or float
        Tokens of a video that stay; a float is a share of them, rounded down.

    Raises
    ------
    ValueError
        If `retain` is neither a positive number nor a share.
    """

    counts_at: ClassVar[str] = "on_projected_features"

    retain: int | float = 0.25

    def fewest(self, frames: int, places: int) -> int:
        """Fewest tokens that can stay of a video."""
        raise NotImplementedError

    def leaves(self, grid: tuple[int, int], tokens: int) -> int:
        return min(tokens, self._wanted(1, tokens))

    def score(self, frames: Tensor, real: Tensor, counts: list[int]) -> Tensor:
        """How good each token is, float `[videos, frames, places]`.

        `frames` `[videos, frames, places, width]`, zero where `real` `[videos, frames, places]` is False; of each video
        `counts` tokens will stay.
        """
        raise NotImplementedError

    def on_projected_features(self, step: VisionStep) -> Keep | None:
        tokens = step.tokens
        totals = zip(tokens.known_views, tokens.known_patches, strict=True)
        wanted = [self._wanted(frames, patches // frames) for frames, patches in totals]
        counts = [min(pair) for pair in zip(tokens.known_lengths, wanted, strict=True)]
        if counts == list(tokens.known_lengths):
            return None
        frames, real, at = in_frames(tokens)
        score = F.pad(self.score(frames, real, wanted).flatten(1), (0, 1))
        return Keep.top(score.gather(1, at), counts)

    def _wanted(self, frames: int, places: int) -> int:
        """Tokens of a video of so many frames that stay."""
        total = frames * places
        return min(total, max(self.fewest(frames, places), tokens_of(self.retain, total, rounded=int)))


def in_frames(tokens: VisionTokens) -> tuple[Tensor, Tensor, Tensor]:
    """States at their places `[videos, frames, places, width]`, float32, and where there are some (bool).

    And where each token has gone, int64 `[videos, tokens]` into frames times places, one beyond for padding.
    """
    each = [patches // views for views, patches in zip(tokens.known_views, tokens.known_patches, strict=True)]
    frames, places = max(tokens.known_views), max(each)
    own = torch.tensor(each, device=tokens.device)[:, None]
    at = tokens.patch_index // own * places + tokens.patch_index % own
    at = at if tokens.valid is None else at.masked_fill(~tokens.valid, frames * places)
    shape = len(at), frames * places + 1
    states = tokens.patches.new_zeros(*shape, tokens.patches.shape[-1], dtype=torch.float32)
    states = states.scatter(1, at[..., None].expand_as(tokens.patches), tokens.patches.float())
    real = torch.zeros(shape, dtype=torch.bool, device=at.device).scatter(1, at, True)
    return *(part[:, :-1].unflatten(1, (frames, places)) for part in (states, real)), at


def masked_mean(values: Tensor, real: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Mean of the real ones of `values` over some dimensions, which stay with size 1."""
    weight = real.to(values.dtype)
    return (values * weight).sum(dims, keepdim=True) / weight.sum(dims, keepdim=True).clamp(min=1)
