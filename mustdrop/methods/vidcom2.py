"""VidCom2 (arXiv 2505.14454): the most particular tokens, more of them from the most particular frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop.methods.frames import FrameMethod, masked_mean

BANDWIDTHS = tuple(2.0**power for power in range(-3, 2))
TEMPERATURE = 0.01
TAKEN = 1e3
"""More than any difference of scores: the tokens within their frames' quotas come first."""


@dataclass
class VidCom2(FrameMethod):
    """VidCom2, with vLLM's exact counts.

    After the projector, on the half of the channels that varies least over the video: how similar a token is to the
    mean of the video and to that of its frame, by Gaussians of several widths. A frame whose tokens are unlike the
    video's gets a larger quota; in a frame those stay that are least similar to both means. Where rounded quotas miss
    the number that is wanted, the next best tokens of all frames make it up.
    """

    def fewest(self, frames: int, places: int) -> int:
        return frames

    def score(self, frames: Tensor, real: Tensor, counts: list[int]) -> Tensor:
        real = real[..., None]
        units = F.normalize(_steady(frames, real), dim=-1) * real
        to_video = _similarity(units, masked_mean(units, real, (1, 2)))
        score = -(to_video + _similarity(units, masked_mean(units, real, (2,))))
        real = real[..., 0]
        unlike = -masked_mean(to_video, real, (2,))[..., 0]
        quota = _quotas(unlike, real.any(-1), torch.tensor(counts, device=score.device), real.sum(-1))
        score = score.masked_fill(~real, -TAKEN)
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return torch.where(rank < quota[..., None], score + TAKEN, score)


def _steady(frames: Tensor, real: Tensor) -> Tensor:
    """The half of the channels with the lowest variance over a video's tokens."""
    away = frames - masked_mean(frames, real, (1, 2))
    variance = masked_mean(away.square(), real, (1, 2))
    half = variance.topk(max(1, frames.shape[-1] // 2), largest=False).indices
    return frames.gather(-1, half.expand(*frames.shape[:-1], -1))


def _similarity(units: Tensor, centre: Tensor) -> Tensor:
    """Sum of Gaussians of the distance to a centre, `[videos, frames, places]`."""
    distance = (units - centre).square().sum(-1)
    return sum(torch.exp(-distance / (2 * width)) for width in BANDWIDTHS)


def _quotas(unlike: Tensor, real: Tensor, counts: Tensor, places: Tensor) -> Tensor:
    """Tokens of each frame, int64 `[videos, frames]`: equal shares, more for frames that are unlike the video."""
    frames = real.sum(-1, keepdim=True)
    share = (unlike.masked_fill(~real, float("-inf")) / TEMPERATURE).softmax(-1)
    even = counts[:, None] / frames.clamp(min=1)
    wanted = even * (1 + share - 1 / frames.clamp(min=1))
    return wanted.round().clamp(min=1).minimum(places).long() * real
