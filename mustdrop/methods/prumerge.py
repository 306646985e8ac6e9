"""LLaVA-PruMerge (arXiv 2403.15388): tokens that stand out in the CLS attention, enriched by their likes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop import ops
from mustdrop.checks import require
from mustdrop.hooks import Attention, Keep, Reducer, VisionStep, VisionTokens, cls_attention, compact, gather
from mustdrop.reach import Touch, Tower


@dataclass
class PruMerge(Reducer):
    """LLaVA-PruMerge, and with `plus` LLaVA-PruMerge+.

    In the block after the selected features, a patch token is salient if the attention that CLS pays it (mean over
    heads) is an outlier: above the third quartile by 1.5 interquartile ranges. Salient tokens stay; each one adds to
    itself the `neighbours` tokens whose keys are most similar to its own by cosine, weighted by their CLS attention.
    All others go into one more token, their sum weighted the same way, in the place of the most attended of them. An
    encoder without CLS takes the attention that all tokens pay a token.

    Parameters
    ----------
    plus : bool
        Keep evenly spaced tokens as well, about three for every salient one.
    neighbours : int
        See above.
    retain : int, optional
        Fix the number of tokens per image instead of looking for outliers: the most attended, with `plus` a quarter
        of them so and the others evenly spaced, and the token of all others. All there are, or more: nothing is done.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """

    counts_at: ClassVar[str] = "after_vision_block"

    plus: bool = False
    neighbours: int = 32
    retain: int | None = None

    def __post_init__(self) -> None:
        require(self.neighbours >= 0, "neighbours", self.neighbours, "0 or more")
        require(self.retain is None or self.retain > 1, "retain", self.retain, "2 or more")

    def leaves(self, grid: tuple[int, int], tokens: int) -> int | None:
        return None if self.retain is None else min(tokens, self.retain)

    def touches(self, tower: Tower) -> Touch:
        if self.retain is not None and self.retain >= tower.patches:
            return Touch()
        here, none = frozenset({tower.last}), frozenset()
        follows = tower.run < tower.blocks
        return Touch(changes=here, reads=none if follows else here, reads_next=here if follows else none)

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        tokens = step.tokens
        if not step.last or (self.retain is not None and self.retain >= tokens.patch_index.shape[1]):
            return None
        attention = step.next_attention or step.attention
        score = cls_attention(attention, tokens)
        stays = self._stays(score, tokens) & (score >= 0)
        rest = score.masked_fill(stays, -1)
        best = rest.argmax(-1, keepdim=True)
        every = stays | (torch.zeros_like(stays).scatter(1, best, True) & (rest >= 0))
        # States are computed for the tokens that stay alone, and put back into the columns that these have.
        left = [min(length, self.retain) for length in tokens.known_lengths] if self.retain is not None else None
        rows, _ = compact(every, pad="right", length=left)
        merged = self._weights(attention, tokens, score, stays, rows) @ tokens.patches.float()
        states = tokens.patches.scatter(1, rows[..., None].expand_as(merged), merged.to(tokens.hidden.dtype))
        column = torch.arange(stays.shape[1], device=stays.device).expand_as(stays)
        more = {"states": states, "merge_into": torch.where(stays, column, best)}
        return Keep.where(every, **more) if left is None else Keep.top(every.float(), left, **more)

    def _stays(self, score: Tensor, tokens: VisionTokens) -> Tensor:
        """Tokens that stay as themselves, bool `[images, tokens]`."""
        column = torch.arange(score.shape[1], device=score.device)
        if self.retain is None:
            real = score if tokens.valid is None else score.masked_fill(~tokens.valid, float("nan"))
            first, third = torch.nanquantile(real, torch.tensor([0.25, 0.75], device=score.device), dim=-1)
            salient = score > (third + 1.5 * (third - first))[:, None]
            salient = salient | ops.top_count(score, 1)
            stride = tokens.counts // salient.sum(-1) // 3
            return salient | (column % stride.clamp(min=1)[:, None] == 0) if self.plus else salient
        salient = ops.top_count(score, max(1, (self.retain - 1) // 4) if self.plus else self.retain - 1)
        if self.plus:
            spaced = self.retain - 1 - max(1, (self.retain - 1) // 4)
            place = (~salient).cumsum(-1) - 1
            others = (~salient).sum(-1, keepdim=True)
            salient = salient | ((place * spaced // others != (place - 1) * spaced // others) & ~salient)
        return salient

    def _weights(
        self, attention: Attention, tokens: VisionTokens, score: Tensor, stays: Tensor, rows: Tensor
    ) -> Tensor:
        """What every token adds to every one that is left, `[images, left, tokens]`."""
        keys = attention.keys().transpose(1, 2).flatten(2)[:, tokens.prefix :]
        keys = F.normalize(keys.float(), dim=-1)
        own = rows[..., None] == torch.arange(stays.shape[1], device=rows.device)
        similarity = (gather(keys, rows) @ keys.transpose(1, 2)).masked_fill(own, float("-inf"))
        if tokens.valid is not None:
            similarity = similarity.masked_fill(~tokens.valid[:, None], float("-inf"))
        nearest = ops.top_count(similarity, self.neighbours) & ~own
        share = score.clamp(min=0)[:, None]  # padding, whose score is -1, adds nothing
        rest = share * ~stays[:, None]
        return torch.where(stays.gather(1, rows)[..., None], own + nearest * share, rest)
