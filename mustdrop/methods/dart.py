"""DART (arXiv 2502.11494): a few pivots stay, and the vision tokens that duplicate them least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop.checks import one_of, require
from mustdrop.hooks import DecoderStep, Keep, Tokens, gather
from mustdrop.methods.layerwise import SingleDrop, Stage


@dataclass
class DART(SingleDrop):
    """DART.

    Before one decoder layer, by the keys of the layer before it: pivots are the vision tokens of an image, and the text
    tokens after the prompt's first image, whose keys have the largest L1 norm over all heads. One pivot after the other
    takes an equal share of the vision tokens that are left, those least similar to it by the cosine of their states
    after the model's final norm. They stay, and the image's own pivots. No attention is computed.

    Parameters
    ----------
    layer : int or float, optional
        The first layer that sees fewer tokens; a float is a fraction of the depth. Default: 2 of 32 layers.
    tokens : int, optional
        Tokens of an image that stay. Default: 64.
    retain : int, optional
        Instead of `tokens`: mean vision tokens per decoder layer and image, by the authors' meter.
    pivots, text_pivots : int
        Pivots of each image, and in the text.
    compat : {"default", "official"}
        "official": every pivot takes equally many, rounded down, the image's own pivots come on top of `tokens`, and
        pivots take their turn in the order of a Python set of their positions. By default exactly `tokens` stay.

    Raises
    ------
    ValueError
        If a setting is out of range, or `retain` out of reach.
    """

    layer: int | float | None = None
    tokens: int | None = None
    retain: int | None = None
    pivots: int = 4
    text_pivots: int = 4
    compat: str = "default"

    def __post_init__(self) -> None:
        one_of("compat", self.compat, ("default", "official"))
        for field in ("tokens", "retain", "pivots"):
            value = getattr(self, field)
            require(value is None or value > 0, field, value, "1 or more")
        require(self.text_pivots >= 0, "text_pivots", self.text_pivots, "0 or more")
        require(self.retain is None or self.tokens is None, "retain", self.retain, "left out where tokens is given")

    def kept(self, tokens: int) -> int:
        number = 64 if self.tokens is None else self.tokens
        if self.compat == "official":
            number = self.pivots + number - number % (self.pivots + self.text_pivots)
        return number

    def keep(self, step: DecoderStep, stages: list[list[Stage | None]]) -> Keep:
        counts = self.wanted(step, stages)
        norms = step.attention.keys().float().abs().sum((1, 3))
        units = F.normalize(step.norm(step.hidden).float(), dim=-1)
        return Keep.top(self.least_duplicated(units, norms, step.tokens, counts).float(), counts)

    def least_duplicated(self, units: Tensor, norms: Tensor, tokens: Tokens, counts: Sequence[Sequence[int]]) -> Tensor:
        """Mark the tokens that stay, so many of each image of each prompt: bool `[batch, length]`.

        `units` `[batch, length, width]` are the tokens' states at unit length, `norms` `[batch, length]` their keys'.
        """
        images = torch.arange(tokens.images, device=norms.device)
        own = tokens.image[:, None] == images[:, None]
        of_image = norms[:, None].masked_fill(~own, float("-inf")).topk(min(self.pivots, norms.shape[1])).indices
        rows, real = tokens.instruction_rows()
        of_text = norms.gather(1, rows).masked_fill(~real, float("-inf"))
        of_text = rows.gather(1, of_text.topk(min(self.text_pivots, rows.shape[1])).indices)
        pivots = torch.cat([of_image, of_text[:, None].expand(-1, tokens.images, -1)], dim=-1)
        shares = torch.tensor(self._shares(tokens, counts, of_text.shape[1]), device=norms.device)
        if self.compat == "official":
            place = tokens.position.gather(-1, pivots.flatten(1)).view_as(pivots)
            real = [self.pivots + min(self.text_pivots, prompt.instruction_tokens) for prompt in tokens.facts()]
            rows = zip(place.tolist(), real, strict=True)
            turn = torch.tensor([[_set_order(one, count) for one in own] for own, count in rows], device=norms.device)
            pivots, shares = pivots.gather(-1, turn), shares.gather(-1, turn)

        taken = torch.zeros_like(own).scatter(-1, of_image, True) & own
        similarity = gather(units, pivots.flatten(1)).unflatten(1, pivots.shape[1:]) @ units[:, None].transpose(-1, -2)
        for to_pivot, share in zip(similarity.unbind(-2), shares.unbind(-1), strict=True):
            rank = to_pivot.masked_fill(~own | taken, float("inf")).argsort(dim=-1, stable=True).argsort(-1)
            taken = taken | ((rank < share[..., None]) & own)
        return taken.any(1)

    def _shares(self, tokens: Tokens, counts: Sequence[Sequence[int]], text: int) -> list[list[list[int]]]:
        """How many tokens each pivot takes, per prompt and image; `text` is the largest number of text pivots."""
        shares = []
        for prompt, wanted in zip(tokens.facts(), counts, strict=True):
            number = self.pivots + min(text, prompt.instruction_tokens)  # a short text has fewer
            rest = [max(0, count - self.pivots) for count in wanted] + [0] * (tokens.images - len(wanted))
            own = [[count // number + (place < count % number) for place in range(number)] for count in rest]
            shares.append([[*share, *[0] * (self.pivots + text - number)] for share in own])
        return shares


def _set_order(positions: list[int], count: int) -> list[int]:
    """The places of the first `count` positions in the order of a Python set of them, then the other places."""
    order = [positions.index(position) for position in set(positions[:count])]
    return order + [place for place in range(len(positions)) if place not in order]
