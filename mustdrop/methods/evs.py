"""EVS (Efficient Video Sampling, arXiv 2510.14624): tokens that differ from the same place a frame earlier."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mustdrop.checks import require
from mustdrop.methods.frames import FrameMethod

FIRST = 255.0
"""Score of the first frame's tokens: all of them stay."""


@dataclass
class EVS(FrameMethod):
    """Efficient Video Sampling, as vLLM serves it.

    After the projector, a token's score is one minus its cosine similarity with the token at the same place of the
    frame before it, whether that one stays or not. The first frame stays whole, then the best tokens of all others.
    """

    def fewest(self, frames: int, places: int) -> int:
        return places

    def check_tokens(self, layers: int, tokens: int) -> None:
        few = not isinstance(self.retain, float) and self.retain < tokens
        require(not few, "retain", self.retain, f"at least {tokens}, a frame: EVS keeps the first one whole")

    def check_views(self, layers: int, tokens: int, views: int) -> None:
        self.check_tokens(layers, tokens)

    def score(self, frames: Tensor, real: Tensor, counts: list[int]) -> Tensor:
        changed = 1 - F.cosine_similarity(frames[:, 1:], frames[:, :-1], dim=-1)
        return F.pad(changed, (0, 0, 1, 0), value=FIRST)
