"""DivPrune (arXiv 2503.02175): the vision tokens that differ most from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop.hooks import Keep, VisionStep
from mustdrop.methods.retaining import Retaining
from mustdrop.ops import for_rows


@dataclass
class DivPrune(Retaining):
    """DivPrune.

    After the projector, each image keeps the subset whose smallest cosine distance is large: first the token farthest
    from its nearest neighbour, then again and again the one farthest from all chosen so far. Attention plays no part.

    Parameters
    ----------
    retain : int or float
        Tokens that every image keeps with all its views; a float is a share of its patches. All it has, or more:
        nothing is done.

    Raises
    ------
    ValueError
        If `retain` is neither a positive number nor a share.
    """

    retain: int | float = 64

    def on_projected_features(self, step: VisionStep) -> Keep | None:
        tokens, counts = step.tokens, self.counts(step.tokens)
        if counts is None:
            return None
        return Keep.top(most_diverse(tokens.patches, counts, tokens.valid).float(), counts)


def most_diverse(features: Tensor, count: int | Sequence[int], valid: Tensor | None = None) -> Tensor:
    """Greedy solution of the max-min diversity problem under cosine distance (DivPrune, algorithm 1).

    Every choice depends on those before it, hence the loop over choices; images go through it together, and the host
    waits for none of them.

    Parameters
    ----------
    features : `[images, tokens, width]`
    count : int or sequence of int
        Tokens to choose of every image, or of each.
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
    most, wanted = for_rows(count, features.device)
    for step in range(most):
        pick = nearest.masked_fill(chosen, float("-inf")).argmax(-1, keepdim=True)
        chosen = chosen.scatter(1, pick, step < wanted)
        to_pick = distance.gather(2, pick[:, None].expand(-1, units.shape[1], 1))[..., 0]
        nearest = torch.minimum(nearest, to_pick) if step else to_pick
    return chosen
