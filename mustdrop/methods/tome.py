"""ToMe (arXiv 2210.09461): in every vision block, merge the pairs of tokens that are most similar."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop import ops
from mustdrop.checks import require
from mustdrop.hooks import Keep, Reducer, VisionStep
from mustdrop.reach import Touch, Tower


@dataclass
class ToMe(Reducer):
    """Token merging.

    Between attention and MLP of every vision block that is run, every other patch token is matched with the most
    similar of the rest, by the cosine of the block's keys (mean over heads); the best pairs merge into their mean
    weighted by size, and attention counts a token as often as its size from then on. CLS is left alone.

    Parameters
    ----------
    retain : int
        Tokens that are left of every image. Blocks merge the same number of pairs each, half of their tokens at most.
        All it has, or more: nothing is done.

    Raises
    ------
    ValueError
        If `retain` is not positive, or lower than what is left if every block merges half of its tokens.
    """

    counts_at: ClassVar[str] = "inside_vision_block"
    proportional_attention: ClassVar[bool] = True

    retain: int = 64

    def __post_init__(self) -> None:
        require(self.retain > 0, "retain", self.retain, "1 or more")

    def check_tower(self, tower: Tower) -> None:
        schedule(tower.patches, self.retain, tower.run)

    def leaves(self, grid: tuple[int, int], tokens: int) -> int:
        return min(tokens, self.retain)

    def touches(self, tower: Tower) -> Touch:
        left = [tower.patches, *schedule(tower.patches, self.retain, tower.run)]
        merging = (block for block, (before, after) in enumerate(pairwise(left)) if after < before)
        return Touch(inside=frozenset(merging))

    def inside_vision_block(self, step: VisionStep) -> Keep | None:
        tokens = step.tokens
        left = schedule(tokens.patch_to_token.shape[1], self.retain, step.run)[step.block]
        pairs = [max(0, min(length - left, length // 2)) for length in tokens.known_lengths]
        if not any(pairs):
            return None
        keys = step.attention.keys().mean(1)[:, tokens.prefix :]
        merge_into = match(keys, torch.tensor(pairs, device=keys.device), tokens.valid)
        total = torch.zeros_like(tokens.size).scatter_add(1, merge_into, tokens.size)
        counts = [length - number for length, number in zip(tokens.known_lengths, pairs, strict=True)]
        return Keep.merge(merge_into, counts, tokens.size / total.gather(1, merge_into))


def schedule(tokens: int, retain: int, blocks: int) -> list[int]:
    """Tokens left after every block, `retain` after the last.

    Raises ValueError if halving them in every block is not enough.
    """
    if retain >= tokens:
        return [tokens] * blocks
    for pairs in range(tokens):
        left = [tokens]
        for _ in range(blocks):
            left.append(max(retain, left[-1] - min(pairs, left[-1] // 2)))
        if left[-1] == retain:
            return left[1:]
    right = f"at least {left[-1]}: each of {blocks} vision blocks merges half of its tokens at most, of {tokens}"
    raise ValueError(f"retain is {retain}: it must be {right}")


def match(keys: Tensor, pairs: Tensor, valid: Tensor | None = None) -> Tensor:
    """Bipartite soft matching (ToMe, section 3): who merges with whom.

    Parameters
    ----------
    keys : `[images, tokens, width]`
    pairs : int64 `[images]`
        Number of tokens that go, half of an image's at most.
    valid : bool `[images, tokens]`, optional
        False for padding, which matches nothing.

    Returns
    -------
    int64 `[images, tokens]`
        Column of the token that each goes into, its own if it stays.
    """
    units = F.normalize(keys.float(), dim=-1)
    similarity = units[:, ::2] @ units[:, 1::2].transpose(1, 2)
    if valid is not None:
        pair = valid[:, ::2, None] & valid[:, None, 1::2]
        similarity = similarity.masked_fill(~pair, float("-inf"))
    similarity, partner = similarity.max(-1)
    merge_into = torch.arange(keys.shape[1], device=keys.device).repeat(len(keys), 1)
    merge_into[:, ::2] = torch.where(ops.top_count(similarity, pairs[:, None]), 2 * partner + 1, merge_into[:, ::2])
    return merge_into
