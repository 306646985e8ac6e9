"""Choosing tokens one after the other, each in view of those before it; the images of a batch go through it together.

Every choice depends on the last, hence a loop over choices; nothing in it waits for the device. A choice for `count`
tokens begins with that for fewer, so that images that want different numbers share the loop: `Keep.top` of the turns
takes of every image as many as it wants.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def in_turn(
    count: int, gain: Callable[[], Tensor], take: Callable[[Tensor], None], valid: Tensor | None = None
) -> Tensor:
    """How early each token is chosen.

    Parameters
    ----------
    count : int
        Tokens to choose.
    gain : callable, () -> `[rows, tokens]`
        What each token would add now; of equal gains the first token is taken.
    take : callable, int64 picks `[rows, 1]` ->
        Is told which token has been chosen.
    valid : bool `[rows, tokens]`, optional
        False for padding, which is never chosen.

    Returns
    -------
    int64 `[rows, tokens]`
        `count` for the first one, 1 for the last, 0 for the others.
    """
    out, turn = None if valid is None else ~valid, None
    for left in range(count, 0, -1):
        gains = gain()
        if turn is None:
            turn = torch.zeros_like(gains, dtype=torch.long)
            out = torch.zeros_like(gains, dtype=torch.bool) if out is None else out
        pick = gains.masked_fill(out, float("-inf")).argmax(-1, keepdim=True)
        turn = turn.scatter_reduce(1, pick, torch.full_like(pick, left), "amax")
        out = out.scatter(1, pick, True)
        take(pick)
    return turn if valid is None else turn * valid


def cosines(features: Tensor) -> Tensor:
    """Cosine similarity of all pairs, `[rows, tokens, width]` -> float32 `[rows, tokens, tokens]`."""
    units = F.normalize(features.float(), dim=-1)
    return units @ units.transpose(1, 2)


class Coverage:
    """Facility location: how well the chosen tokens stand for all of an image.

    A token is covered as well as it is similar to the chosen one most similar to it; at first not at all.
    `similarity` `[rows, tokens, tokens]`; padding, where `valid` `[rows, tokens]` is False, need not be covered. Those
    of `chosen`, bool `[rows, tokens]`, cover from the beginning.
    """

    def __init__(self, similarity: Tensor, valid: Tensor | None = None, chosen: Tensor | None = None):
        self.similarity = similarity if valid is None else similarity.masked_fill(~valid[:, None], 0)
        self.covered = torch.zeros_like(similarity[:, 0])
        if chosen is not None:
            self.covered = self.similarity.masked_fill(~chosen[..., None], 0).amax(1)

    def gain(self) -> Tensor:
        """By how much each token would raise the sum over all tokens, `[rows, tokens]`."""
        return (self.similarity - self.covered[:, None]).clamp(min=0).sum(-1)

    def take(self, pick: Tensor) -> None:
        """One more token is chosen, int64 `[rows, 1]`."""
        self.covered = torch.maximum(self.covered, _row(self.similarity, pick))


class Nearest:
    """Each token's largest similarity to a chosen one: `largest` `[rows, tokens]`, -1 while none is chosen.

    `chosen`, bool `[rows, tokens]`, are chosen from the beginning.
    """

    def __init__(self, similarity: Tensor, chosen: Tensor | None = None):
        self.similarity = similarity
        self.largest = torch.full_like(similarity[:, 0], -1)
        if chosen is not None:
            self.largest = similarity.masked_fill(~chosen[:, None], -1).amax(-1)

    def take(self, pick: Tensor) -> None:
        """One more token is chosen, int64 `[rows, 1]`."""
        self.largest = torch.maximum(self.largest, _row(self.similarity, pick))


def _row(similarity: Tensor, pick: Tensor) -> Tensor:
    """The similarities of one token of every row, `[rows, tokens]`."""
    return similarity.gather(1, pick[..., None].expand(-1, -1, similarity.shape[2]))[:, 0]
