"""SCOPE (arXiv 2510.24214): tokens that cover the image, the salient ones first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mustdrop.attention import cls_attention
from mustdrop.checks import require
from mustdrop.greedy import Coverage, cosines, in_turn
from mustdrop.hooks import Keep, VisionStep
from mustdrop.methods.salience import InTower


@dataclass
class SCOPE(InTower):
    """SCOPE.

    On the output of the vision encoder, tokens are chosen one after the other: the one whose attention from CLS (last
    block that is run) times what it adds to the coverage of the image is largest. A token is covered as well as it is
    similar, by cosine, to the chosen one most similar to it. An encoder without CLS takes what all tokens pay.

    `retain`, `compat` and `per` as in `InTower`.

    Parameters
    ----------
    alpha : float
        Exponent of the attention; 0 leaves coverage alone.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha >= 0, "alpha", self.alpha, "0 or more")

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        tokens = step.tokens
        counts = self.counts(tokens) if step.last else None
        if counts is None:
            return None
        saliency = cls_attention(step.attention, tokens) ** self.alpha
        return Keep.top(most_covering(tokens.patches, saliency, max(counts), tokens.valid), counts)


def most_covering(features: Tensor, saliency: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
    """Greedy facility location weighted by saliency (SCOPE, section 3.3): each token's turn, see `greedy.in_turn`.

    `features` `[rows, tokens, width]`, `saliency` and bool `valid` `[rows, tokens]`.
    """
    coverage = Coverage(cosines(features), valid)
    return in_turn(count, lambda: saliency * coverage.gain(), coverage.take, valid)
