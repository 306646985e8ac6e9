"""ToMe (arXiv 2210.09461): in every vision block, merge the pairs of tokens that are most similar."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop import ops
from mustdrop.checks import require
from mustdrop.hooks import Keep, VisionStep
from mustdrop.methods.retaining import Retaining
from mustdrop.reach import Touch, Tower
from mustdrop.retain import at_least


@dataclass
class ToMe(Retaining):
    """Token merging.

    Between attention and MLP of every vision block that is run, every other patch token is matched with the most
    similar of the rest, by the cosine of the block's keys (mean over heads); the best pairs merge into their mean
    weighted by size, and attention counts a token as often as its size from then on. CLS is left alone.

    Parameters
    ----------
    retain : int or float
        Tokens that are left of every image with all its views; a float is a share of its patches. Blocks merge the same
        number of pairs of a view each, half of its tokens at most. All it has, or more: nothing is done.
    per : {"image", "view"}
        "view": that many of every tile or frame, instead of an image with all of them.

    Raises
    ------
    ValueError
        If `retain` is neither a positive number nor a share, or lower than what is left if every block merges half of
        its tokens.
    """

    counts_at: ClassVar[str] = "inside_vision_block"
    proportional_attention: ClassVar[bool] = True

    retain: int | float = 64
    per: str = field(default="image", kw_only=True)

    def check_tower(self, tower: Tower) -> None:
        self._left(tower.patches, self.kept(tower.patches, tower.patches), tower.run)

    def touches(self, tower: Tower) -> Touch:
        return Touch(inside=frozenset(range(tower.run)))

    def _left(self, patches: int, count: int, blocks: int) -> list[int]:
        """Tokens of a view that are left after every block, `count` after the last; ValueError if there are more."""
        left = schedule(patches, count, blocks)
        of_view = count == self.kept(patches, patches)
        least = at_least(self.retain, left[-1], patches) if of_view else f"enough for {left[-1]} tokens of every view"
        right = f"{least}: each of {blocks} vision blocks merges half of its tokens at most, of {patches}"
        require(left[-1] <= count, "retain", self.retain, right)
        return left

    def inside_vision_block(self, step: VisionStep) -> Keep | None:
        tokens, patches = step.tokens, step.tokens.patch_to_token.shape[1]
        if not step.block:
            counts = tokens.divided(lambda all_patches, _: self.kept(all_patches, all_patches), self.per)
            step.scratch["left"] = [self._left(patches, count, step.run) for count in counts]
        left = (own[step.block] for own in step.scratch["left"])
        pairs = [max(0, min(now - then, now // 2)) for now, then in zip(tokens.known_lengths, left, strict=True)]
        if not any(pairs):
            return None
        keys = step.attention.keys().mean(1)[:, tokens.prefix :]
        merge_into = match(keys, torch.tensor(pairs, device=keys.device), tokens.valid)
        total = torch.zeros_like(tokens.size).scatter_add(1, merge_into, tokens.size)
        counts = [length - number for length, number in zip(tokens.known_lengths, pairs, strict=True)]
        return Keep.merge(merge_into, counts, tokens.size / total.gather(1, merge_into).clamp(min=1))  # padding: 0 of 1


@lru_cache(maxsize=256)
def schedule(tokens: int, retain: int, blocks: int) -> list[int]:
    """Tokens left after every block, `retain` after the last, or more if halving them in every block is not enough."""
    if retain >= tokens:
        return [tokens] * blocks
    for pairs in range(tokens):
        left = [tokens]
        for _ in range(blocks):
            left.append(max(retain, left[-1] - min(pairs, left[-1] // 2)))
        if left[-1] == retain:
            break
    return left[1:]


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
