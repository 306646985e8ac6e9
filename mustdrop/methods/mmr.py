"""Maximal marginal relevance (Carbonell and Goldstein, 1998): tokens that matter and repeat no chosen one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mustdrop.checks import require
from mustdrop.greedy import Nearest, cosines, in_turn
from mustdrop.hooks import Keep, VisionStep
from mustdrop.methods.salience import AfterTower
from mustdrop.ops import stretched


@dataclass
class MMR(AfterTower):
    """Maximal marginal relevance, the rule of IDPruner with attention in the place of its trained scorer.

    After the projector, tokens are chosen one after the other, by `weight` times the attention that CLS paid them in
    the last vision block (all tokens, where there is no CLS), stretched from 0 to 1, minus the rest times their
    largest cosine similarity with a chosen one.

    Parameters
    ----------
    retain : int or float
        Tokens that every image keeps with all its views; a float is a share of its patches.
    weight : float
        Of attention against similarity.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """

    retain: int | float = 64
    weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.weight <= 1, "weight", self.weight, "between 0 and 1")

    def on_projected_features(self, step: VisionStep) -> Keep | None:
        tokens, counts = step.tokens, self.counts(step.tokens)
        if counts is None:
            return None
        importance = stretched(tokens.notes["cls_attention"], tokens.valid)
        return Keep.top(most_relevant(tokens.patches, importance, max(counts), self.weight, tokens.valid), counts)


def most_relevant(
    features: Tensor, importance: Tensor, count: int, weight: float = 0.5, valid: Tensor | None = None
) -> Tensor:
    """Each token's turn, see `greedy.in_turn`; `features` `[rows, tokens, width]`, the others `[rows, tokens]`."""
    nearest = Nearest(cosines(features))
    return in_turn(count, lambda: weight * importance - (1 - weight) * nearest.largest, nearest.take, valid)
