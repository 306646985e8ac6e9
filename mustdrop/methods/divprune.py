"""DivPrune (arXiv 2503.02175): the vision tokens that differ most from each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop.checks import require
from mustdrop.hooks import Keep, Reducer, VisionStep


@dataclass
class DivPrune(Reducer):
    """DivPrune.

    After the projector, each image keeps the subset whose smallest cosine distance is large: first the token farthest
    from its nearest neighbour, then again and again the one farthest from all chosen so far. Attention plays no part.

    Parameters
    ----------
    retain : int
        Tokens that every image keeps. All it has, or more: nothing is done.

    Raises
    ------
    ValueError
        If `retain` is not positive.
    """

    retain: int = 64

    def __post_init__(self) -> None:
        require(self.retain > 0, "retain", self.retain, "1 or more")

    def leaves(self, grid: tuple[int, int], tokens: int) -> int:
        return min(tokens, self.retain)

    def on_projected_features(self, step: VisionStep) -> Keep | None:
        tokens = step.tokens
        if self.retain >= tokens.patch_index.shape[1]:
            return None
        return Keep.top(most_diverse(tokens.patches, self.retain, tokens.valid).float(), self.retain)


def most_diverse(features: Tensor, count: int, valid: Tensor | None = None) -> Tensor:
    """Greedy solution of the max-min diversity problem under cosine distance (DivPrune, algorithm 1).

    Every choice depends on those before it, hence the loop over choices; images go through it together, and the host
    waits for none of them.

    Parameters
    ----------
    features : `[images, tokens, width]`
    count : int
        Tokens to choose.
    valid : bool `[images, tokens]`, optional
        False for padding, which is chosen last.

    Returns
    -------
    bool `[images, tokens]`
    """
    units = F.normalize(features.float(), dim=-1)
    distance = 1 - units @ units.transpose(1, 2)
    chosen = torch.zeros(units.shape[:2], dtype=torch.bool, device=units.device)
    if valid is not None:
        padded = ~valid
        distance = distance.masked_fill(padded[:, None], float("inf")).masked_fill(padded[..., None], -1)
    nearest = distance.masked_fill(torch.eye(units.shape[1], dtype=torch.bool, device=units.device), float("inf"))
    nearest = nearest.amin(-1)
    for step in range(count):
        pick = nearest.masked_fill(chosen, float("-inf")).argmax(-1, keepdim=True)
        chosen = chosen.scatter(1, pick, True)
        to_pick = distance.gather(2, pick[:, None].expand(-1, units.shape[1], 1))[..., 0]
        nearest = torch.minimum(nearest, to_pick) if step else to_pick
    return chosen
