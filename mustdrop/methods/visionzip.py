"""VisionZip (arXiv 2412.04467): dominant tokens stay, the others are merged into a few contextual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop import ops
from mustdrop.checks import one_of, require
from mustdrop.hooks import Keep, Reducer, VisionStep, cls_attention, compact, gather
from mustdrop.reach import Touch, Tower

CONTEXTUAL_SHARE = 10 / 64  # of the published 54 + 10, 108 + 20 and 162 + 30


@dataclass
class VisionZip(Reducer):
    """VisionZip.

    In the last vision-encoder block that is run, the patch tokens to which CLS attends most (sum over heads) are
    dominant and stay. Of the others, evenly strided ones are targets; each remaining token joins the target whose key
    (mean over heads) is most similar to its own by cosine, and target and joiners become one contextual token. An
    encoder without CLS takes the attention that all tokens pay a token.

    Parameters
    ----------
    dominant, contextual : int, optional
        Numbers of tokens per image. Default: 54 and 10.
    retain : int, optional
        Instead: their sum, divided as published. Images with no more tokens than that are left alone.
    compat : {"default", "official"}
        "official": CLS itself is one of the dominant tokens and comes first, contextual tokens come last, positions
        are consecutive, and a contextual token is its target plus the mean of the others. By default all tokens stay
        where they are in the image, and a contextual token is the mean of all its members.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    counts_at: ClassVar[str] = "after_vision_block"

    dominant: int | None = None
    contextual: int | None = None
    retain: int | None = None
    compat: str = "default"

    def __post_init__(self) -> None:
        one_of("compat", self.compat, ("default", "official"))
        self.positions = "renumber" if self.compat == "official" else "original"
        numbers, retain = (self.dominant, self.contextual), self.retain
        require(retain is None or retain > 1, "retain", retain, "2 or more: one dominant and one contextual token")
        for field, number in zip(("dominant", "contextual"), numbers, strict=True):
            require(number is None or number > 0, field, number, "1 or more")
            require(number is None or retain is None, "retain", retain, f"left out where {field} is given")

    def check_tokens(self, layers: int, tokens: int) -> None:
        for field, number in (("dominant", self.dominant), ("contextual", self.contextual)):
            require(number is None or number <= tokens, field, number, f"at most the {tokens} tokens of an image")

    def leaves(self, grid: tuple[int, int], tokens: int) -> int:
        return min(tokens, sum(self.numbers))

    def touches(self, tower: Tower) -> Touch:
        here = frozenset({tower.last} if sum(self.numbers) < tower.patches else ())
        return Touch(changes=here, reads=here)

    @property
    def numbers(self) -> tuple[int, int]:
        """Dominant and contextual tokens per image."""
        if self.retain is None:
            return 54 if self.dominant is None else self.dominant, 10 if self.contextual is None else self.contextual
        contextual = max(1, round(self.retain * CONTEXTUAL_SHARE))
        return self.retain - contextual, contextual

    def check_placeholders(self) -> None:
        if self.compat == "official":
            raise ValueError(
                "compat: got 'official', expected 'default': it makes a token of CLS, for which a prompt of "
                "transformers' own classes has no placeholder"
            )

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        tokens, (dominant, contextual) = step.tokens, self.numbers
        if not step.last or dominant + contextual >= tokens.patch_index.shape[1]:
            return None
        official = self.compat == "official" and tokens.prefix == 1
        stays = ops.top_count(cls_attention(step.attention, tokens), dominant - official)
        real = torch.ones_like(stays) if tokens.valid is None else tokens.valid
        rest = [max(0, length - dominant + official) for length in tokens.known_lengths]
        others, _ = compact(~stays & real, pad="right", length=rest)
        stride = torch.tensor([max(1, number // contextual) for number in rest], device=stays.device)
        place = torch.arange(contextual, device=stays.device) * stride[:, None]
        targets = others.gather(1, place.clamp(max=others.shape[1] - 1))

        keys = F.normalize(step.attention.keys().mean(1)[:, tokens.prefix :].float(), dim=-1)
        nearest = (keys @ gather(keys, targets).transpose(1, 2)).argmax(-1)
        column = torch.arange(stays.shape[1], device=stays.device).expand_as(stays)
        is_target = torch.zeros_like(stays).scatter(1, targets, True)
        few = torch.tensor([length <= dominant + contextual for length in tokens.known_lengths], device=stays.device)
        merge_into = torch.where(stays | is_target | ~real | few[:, None], column, targets.gather(1, nearest))
        left = [min(length, dominant + contextual - official) for length in tokens.known_lengths]
        if not official:
            return Keep.merge(merge_into, left)
        return Keep.merge(merge_into, left, **self._official(merge_into, is_target))

    def _official(self, merge_into: Tensor, is_target: Tensor) -> dict[str, Tensor | bool]:
        """What the authors' code does: a target plus the mean of those that join it, at the end, and CLS in front."""
        column = torch.arange(merge_into.shape[1], device=merge_into.device)
        joins = merge_into != column
        joiners = torch.zeros_like(merge_into).scatter_add(1, merge_into, joins.long())
        weights = torch.where(joins, 1 / joiners.gather(1, merge_into), 1.0)
        return {"weights": weights, "order": column + is_target * len(column), "with_prefix": True}
