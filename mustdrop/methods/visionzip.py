"""VisionZip (arXiv 2412.04467): dominant tokens stay, the others are merged into a few contextual ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop import ops
from mustdrop.attention import cls_attention
from mustdrop.checks import one_of, require
from mustdrop.hooks import Keep, VisionStep, VisionTokens, compact, gather
from mustdrop.methods.retaining import Retaining
from mustdrop.reach import Touch, Tower
from mustdrop.retain import tokens_of

CONTEXTUAL_SHARE = 10 / 64  # of the published 54 + 10, 108 + 20 and 162 + 30


@dataclass
class VisionZip(Retaining):
    """VisionZip.

    In the last vision-encoder block that is run, the patch tokens to which CLS attends most are
    dominant and stay. Of the others, evenly strided ones are targets; each remaining token joins the target whose key
    (mean over heads) is most similar to its own by cosine, and target and joiners become one contextual token. An
    encoder without CLS takes the attention that all tokens pay a token.

    Parameters
    ----------
    dominant, contextual : int, optional
        Numbers of tokens per image with all its views. Default: 54 and 10.
    retain : int or float, optional
        Instead: their sum, divided as published; a float is a share of the image's patches. Images with no more tokens
        than that are left alone.
    per : {"image", "view"}, optional
        "view": numbers are those of every tile or frame, instead of an image with all of them. Default: image, and view
        with `compat` "official".
    compat : {"default", "official"}
        "official": CLS itself is one of the dominant tokens and comes first, contextual tokens come last, positions
        are consecutive, and a contextual token is its target plus the mean of the others. By default all tokens stay
        where they are in the image, and a contextual token is the mean of all its members. Of an image in tiles:
        the overview's tokens, then the tiles' dominant ones in raster order of the stitched image, every tile's CLS,
        and the contextual ones tile by tile; nothing is cut off and no newline is left.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    counts_at: ClassVar[str] = "after_vision_block"

    dominant: int | None = None
    contextual: int | None = None
    retain: int | float | None = None
    compat: str = "default"
    per: str | None = field(default=None, kw_only=True)

    least: ClassVar[int] = 2  # one dominant and one contextual token

    def __post_init__(self) -> None:
        one_of("compat", self.compat, ("default", "official"))
        official = self.compat == "official"
        self.positions, self.tile_order = ("renumber", "flat") if official else ("original", "model")
        self.needs_tiles = official
        self.per = self.per or ("view" if official else "image")
        super().__post_init__()
        numbers, retain = (self.dominant, self.contextual), self.retain
        for name, number in zip(("dominant", "contextual"), numbers, strict=True):
            require(number is None or number > 0, name, number, "1 or more")
            require(number is None or retain is None, "retain", retain, f"left out where {name} is given")

    def check_tokens(self, layers: int, tokens: int) -> None:
        for name, number in (("dominant", self.dominant), ("contextual", self.contextual)):
            require(number is None or number <= tokens, name, number, f"at most the {tokens} tokens of an image")

    def kept(self, patches: int, tokens: int) -> int:
        return min(tokens, sum(self.numbers_of(patches)))

    def leaves(self, grid: tuple[int, int], tokens: int) -> int:
        return self.kept(grid[0] * grid[1], tokens)

    def touches(self, tower: Tower) -> Touch:
        here = frozenset({tower.last})
        return Touch(changes=here, reads=here)

    @property
    def numbers(self) -> tuple[int, int]:
        """Dominant and contextual tokens of an image of 576 patches, of which the published ones are."""
        return self.numbers_of(576)

    def numbers_of(self, patches: int) -> tuple[int, int]:
        """Dominant and contextual tokens of an image of so many patches."""
        if self.retain is None:
            return 54 if self.dominant is None else self.dominant, 10 if self.contextual is None else self.contextual
        retain = tokens_of(self.retain, patches, self.least)
        contextual = max(1, round(retain * CONTEXTUAL_SHARE))
        return retain - contextual, contextual

    def check_placeholders(self, any_size: bool = False) -> None:
        if self.compat == "official":
            raise ValueError(
                "compat: got 'official', expected 'default': it makes a token of CLS, for which a prompt of "
                "transformers' own classes has no placeholder"
            )

    def after_vision_block(self, step: VisionStep) -> Keep | None:
        tokens, counts = step.tokens, self.counts(step.tokens) if step.last else None
        if counts is None:
            return None
        official = self.compat == "official" and tokens.prefix == 1
        contextual = self._contextual(tokens, counts)
        dominant = [max(0, count - number - official) for count, number in zip(counts, contextual, strict=True)]
        score = cls_attention(step.attention, tokens)
        score = score if tokens.valid is None else score.masked_fill(~tokens.valid, float("-inf"))
        stays = ops.top_count(score, ops.for_rows(dominant, tokens.device)[1])
        real = torch.ones_like(stays) if tokens.valid is None else tokens.valid
        rest = [max(0, length - number) for length, number in zip(tokens.known_lengths, dominant, strict=True)]
        others, _ = compact(~stays & real, pad="right", length=rest)
        # Of a view with fewer targets than others have, the last one fills their places.
        targets = [max(1, number) for number in contextual]
        stride = [max(1, left // number) for left, number in zip(rest, targets, strict=True)]
        most, last = ops.for_rows([number - 1 for number in targets], stays.device)
        place = torch.arange(most + 1, device=stays.device).expand(len(stride), -1).clamp(max=last)
        place = place * torch.tensor(stride, device=stays.device)[:, None]
        targets = others.gather(1, place.clamp(max=others.shape[1] - 1))

        keys = F.normalize(step.attention.keys().mean(1)[:, tokens.prefix :].float(), dim=-1)
        nearest = (keys @ gather(keys, targets).transpose(1, 2)).argmax(-1)
        column = torch.arange(stays.shape[1], device=stays.device).expand_as(stays)
        is_target = torch.zeros_like(stays).scatter(1, targets, True)
        pairs = list(zip(tokens.known_lengths, counts, strict=True))
        few = torch.tensor([length <= count for length, count in pairs], device=stays.device)
        step.scratch["contextual"] = is_target.sum(-1)
        merge_into = torch.where(stays | is_target | ~real | few[:, None], column, targets.gather(1, nearest))
        left = [length if length <= count else max(0, count - official) for length, count in pairs]
        if not official:
            return Keep.merge(merge_into, left)
        return Keep.merge(merge_into, left, **self._official(merge_into, is_target))

    def _contextual(self, tokens: VisionTokens, counts: list[int]) -> list[int]:
        """How many of each row's tokens are contextual: the image's part of its tokens, one at least, if it has any."""
        parts = [self.numbers_of(patches) for patches in tokens.patches_together(self.per)]
        return [
            min(count, max(1, (2 * count * number + total) // (2 * total)))  # rounded, without floats
            for count, (dominant, number) in zip(counts, parts, strict=True)
            for total in [dominant + number]
        ]

    def overrides(self, hook: str) -> bool:
        return super().overrides(hook) and (hook != "on_projected_features" or self.compat == "official")

    def on_projected_features(self, step: VisionStep) -> Keep | None:
        tokens, contextual = step.tokens, step.scratch.get("contextual")
        if contextual is None or tokens.tiles is None or not any(tokens.tiles):
            return None
        order = stitched_order(tokens, contextual)
        return Keep.top(torch.ones_like(order, dtype=torch.float), order.shape[1], order=order)

    def _official(self, merge_into: Tensor, is_target: Tensor) -> dict[str, Tensor | bool]:
        """What the authors' code does: a target plus the mean of those that join it, at the end, and CLS in front."""
        column = torch.arange(merge_into.shape[1], device=merge_into.device)
        joins = merge_into != column
        joiners = torch.zeros_like(merge_into).scatter_add(1, merge_into, joins.long())
        weights = torch.where(joins, 1 / joiners.gather(1, merge_into), 1.0)
        return {"weights": weights, "order": column + is_target * len(column), "with_prefix": True}


def stitched_order(tokens: VisionTokens, contextual: Tensor) -> Tensor:
    """Sort key of the tokens of images in tiles as the authors' code puts them, int64 `[images, tokens]`.

    Parameters
    ----------
    tokens : VisionTokens
        Of each view equally many: CLS, dominant ones, contextual ones.
    contextual : int64 `[views]`
        Contextual tokens of each view.
    """
    device, (rows, columns) = tokens.device, tokens.grid
    views = torch.tensor(tokens.known_views, device=device)
    first, of_view = (views.cumsum(0) - views)[:, None], torch.tensor(tokens.known_lengths, device=device) // views
    across = torch.tensor([1 if grid is None else grid[1] for grid in tokens.tiles], device=device)[:, None]
    view, patch = tokens.patch_index // (rows * columns), tokens.patch_index % (rows * columns)
    place = torch.arange(tokens.patch_index.shape[1], device=device).expand_as(view)
    within, tile = place % of_view[:, None], (view - 1).clamp(min=0)
    # Raster over the stitched image: its rows run through all tiles beside each other.
    row, column = tile // across * rows + patch // columns, tile % across * columns + patch % columns
    raster = row * across * columns + column
    last = within >= of_view[:, None] - contextual[first + view]
    kind = torch.where(within == 0, 2, torch.where(last, 3, 1)).masked_fill(view == 0, 0)
    key = torch.where(kind == 1, raster, place) + kind * (rows * columns * int(max(tokens.known_views)) + 1)
    alone = torch.tensor([grid is None for grid in tokens.tiles], device=device)[:, None]
    return torch.where(alone, place, key)
