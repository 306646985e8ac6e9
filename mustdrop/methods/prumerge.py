"""LLaVA-PruMerge (arXiv 2403.15388): tokens that stand out in the CLS attention, enriched by their likes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop import ops
from mustdrop.attention import cls_attention
from mustdrop.checks import require
from mustdrop.hooks import Attention, Keep, VisionStep, VisionTokens, compact, gather
from mustdrop.methods.retaining import Retaining
from mustdrop.reach import Touch, Tower


@dataclass
class PruMerge(Retaining):
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
    retain : int or float, optional
        Fix the number of tokens per image with all its views instead of looking for outliers: the most attended, with
        `plus` a quarter of them so and the others evenly spaced, and the token of all others. A float is a share of the
        image's patches. All there are, or more: nothing is done.
    per : {"image", "view"}
        "view": that many of every tile or frame, instead of an image with all of them.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """

    counts_at: ClassVar[str] = "after_vision_block"

    plus: bool = False
    neighbours: int = 32
    retain: int | float | None = None
    per: str = field(default="image", kw_only=True)

    least: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.neighbours >= 0, "neighbours", self.neighbours, "0 or more")

    def touches(self, tower: Tower) -> Touch:
        here, none = frozenset({tower.last}), frozenset()
        follows = tower.run < tower.blocks
        return Touch(changes=here, reads=none if follows else here, reads_next=here if follows else none)

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        tokens = step.tokens
        left = self.counts(tokens) if step.last and self.retain is not None else None
        if not step.last or (left is None and self.retain is not None):
            return None
        attention = step.next_attention or step.attention
        score = cls_attention(attention, tokens)
        score = score if tokens.valid is None else score.masked_fill(~tokens.valid, -1)
        stays = (self._outliers(score, tokens) if left is None else self._best(score, left)) & (score >= 0)
        rest = score.masked_fill(stays, -1)
        best = rest.argmax(-1, keepdim=True)
        every = stays | (torch.zeros_like(stays).scatter(1, best, True) & (rest >= 0))
        # States are computed for the tokens that stay alone, and put back into the columns that these have.
        rows, _ = compact(every, pad="right", length=left)
        merged = self._weights(attention, tokens, score, stays, rows) @ tokens.patches.float()
        states = tokens.patches.scatter(1, rows[..., None].expand_as(merged), merged.to(tokens.hidden.dtype))
        whole = [now == then for now, then in zip(left or (), tokens.known_lengths, strict=False)]
        if any(whole):  # beside others of which something goes
            states = torch.where(torch.tensor(whole, device=states.device)[:, None, None], tokens.patches, states)
        column = torch.arange(stays.shape[1], device=stays.device).expand_as(stays)
        more = {"states": states, "merge_into": torch.where(stays, column, best)}
        return Keep.where(every, **more) if left is None else Keep.top(every.float(), left, **more)

    def _outliers(self, score: Tensor, tokens: VisionTokens) -> Tensor:
        """Tokens that stay as themselves because they stand out, bool `[images, tokens]`."""
        column = torch.arange(score.shape[1], device=score.device)
        real = score if tokens.valid is None else score.masked_fill(~tokens.valid, float("nan"))
        first, third = torch.nanquantile(real, torch.tensor([0.25, 0.75], device=score.device), dim=-1)
        salient = score > (third + 1.5 * (third - first))[:, None]
        salient = salient | ops.top_count(score, 1)
        stride = tokens.counts // salient.sum(-1) // 3
        return salient | (column % stride.clamp(min=1)[:, None] == 0) if self.plus else salient

    def _best(self, score: Tensor, left: Sequence[int]) -> Tensor:
        """The same, all but one of so many of each image."""
        best = [max(0, number - 1) for number in left]
        first = [min(number, max(1, number // 4)) for number in best] if self.plus else best
        salient = ops.top_count(score, ops.for_rows(first, score.device)[1])
        if not self.plus:
            return salient
        spaced = [number - taken for number, taken in zip(best, first, strict=True)]
        spaced = ops.for_rows(spaced, score.device)[1]
        place = (~salient).cumsum(-1) - 1
        others = (~salient).sum(-1, keepdim=True)
        return salient | ((place * spaced // others != (place - 1) * spaced // others) & ~salient)

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
