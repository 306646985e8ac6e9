"""VisionZip (arXiv 2412.04467): dominant tokens stay, the others are merged into a few contextual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop import ops
from mustdrop.checks import one_of, require
from mustdrop.hooks import Keep, Reducer, VisionStep, VisionTokens, compact, gather
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
    retain: int | None = None
    compat: str = "default"

    def __post_init__(self) -> None:
        one_of("compat", self.compat, ("default", "official"))
        official = self.compat == "official"
        self.positions, self.tile_order = ("renumber", "flat") if official else ("original", "model")
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
        stays = ops.top_count(self._score(step), dominant - official)
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
        step.scratch["contextual"] = is_target.sum(-1)
        merge_into = torch.where(stays | is_target | ~real | few[:, None], column, targets.gather(1, nearest))
        left = [min(length, dominant + contextual - official) for length in tokens.known_lengths]
        if not official:
            return Keep.merge(merge_into, left)
        return Keep.merge(merge_into, left, **self._official(merge_into, is_target))

    def overrides(self, hook: str) -> bool:
        return super().overrides(hook) and (hook != "on_projected_features" or self.compat == "official")

    def on_projected_features(self, step: VisionStep) -> Keep | None:
        tokens, contextual = step.tokens, step.scratch.get("contextual")
        if contextual is None or tokens.tiles is None or not any(tokens.tiles):
            return None
        order = stitched_order(tokens, contextual)
        return Keep.top(torch.ones_like(order, dtype=torch.float), order.shape[1], order=order)

    def _score(self, step: VisionStep) -> Tensor:
        """Attention that CLS (without one: every token) pays each patch token, `[images, tokens]`."""
        tokens = step.tokens
        rows = torch.arange(tokens.prefix or tokens.patch_index.shape[1], device=tokens.hidden.device)
        probabilities = step.attention.probabilities(rows.expand(len(tokens.patch_index), -1))
        score = probabilities.sum((1, 2))[:, tokens.prefix :]
        return score if tokens.valid is None else score.masked_fill(~tokens.valid, float("-inf"))

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
