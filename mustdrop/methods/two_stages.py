"""What methods share that let more tokens enter the decoder than stay on average, and drop the rest inside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from operator import mul
from typing import ClassVar

import torch
from torch import Tensor

from mustdrop.hooks import Attention, DecoderStep, compact
from mustdrop.methods.layerwise import LayerwiseDrop, layer_number
from mustdrop.methods.salience import AfterTower
from mustdrop.retain import check_retain, tokens_of
from mustdrop.tokens import Tokens


@dataclass
class Entrance(AfterTower):
    """The first stage: `share` times `retain` tokens of every image enter the decoder."""

    retain: int | float = 64
    share: float = 2.0

    def kept(self, patches: int, tokens: int) -> int:
        return min(tokens, max(1, int(self.share * tokens_of(self.retain, patches))))


@dataclass
class Inside(LayerwiseDrop):
    """The second stage: from some decoder layers on, shares of `retain` stay of every image.

    `shares` are by first layer, a fraction of the depth; `enter` is the first stage's. Where an image has too few
    tokens for that one, more of them stay, so that the mean is met all the same; where `retain` is all its patches,
    nothing is done.
    """

    retain: int | float = 64
    shares: Mapping[float, float] = field(default_factory=dict)
    enter: float = 2.0

    compat: ClassVar[str] = "default"

    def __post_init__(self) -> None:
        check_retain(self.retain)

    def asks_after(self, layers: int) -> list[int]:
        return [layer_number(first, layers) - 1 for first in self.shares]

    def schedule(self, layers: int, tokens: int, patches: int | None = None) -> dict[int, int]:
        patches = patches or tokens
        retain = tokens_of(self.retain, patches)
        if retain >= patches:
            return {}

        def stages(number: float) -> dict[int, int]:
            numbers = (min(tokens, max(1, int(share * number))) for share in self.shares.values())
            return dict(zip(self.asks_after(layers), numbers, strict=True))

        if int(self.enter * retain) <= patches:
            return stages(retain)
        mean = min(tokens, round(retain * self.mean))
        most = tokens / min(self.shares.values())
        return self.solve(mean, layers, tokens, patches, lambda share: stages(share * most))

    @property
    def mean(self) -> float:
        """Tokens per layer for one of `retain`."""
        spans = (end - first for first, end in pairwise([0.0, *self.shares, 1.0]))
        return sum(map(mul, spans, (self.enter, *self.shares.values())))


def of_text(attention: Attention, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Attention of all text after the first image, `[batch, heads, rows, length]`, and which rows are real.

    A prompt without such text is asked for its last token.
    """
    if not tokens.instruction_tokens:
        rows = tokens.last_row()
        return attention.probabilities(rows), torch.ones_like(rows, dtype=torch.bool)
    rows, real = tokens.instruction_rows()
    none = ~real.any(-1, keepdim=True)
    rows = torch.where(none, tokens.last_row(), rows)
    return attention.probabilities(rows), real | none


def by_image(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Columns of every image's tokens, int64 `[batch * images, most]`, and which are real; the host knows how many."""
    own = tokens.image[:, None] == torch.arange(tokens.images, device=tokens.image.device)[:, None]
    counts = [[image.tokens for image in prompt.images] for prompt in tokens.facts()]
    lengths = [number for own in counts for number in [*own, *[0] * (tokens.images - len(own))]]
    columns, real = compact(own.flatten(0, 1), pad="right", length=lengths)
    return columns, torch.ones_like(columns, dtype=torch.bool) if real is None else real


def at_columns(values: Tensor, columns: Tensor, real: Tensor, tokens: Tokens) -> Tensor:
    """Values of `by_image`'s tokens at their columns, float32 `[batch, length]`; 0 for text."""
    batch, length = tokens.image.shape
    spread = torch.zeros(batch, length, device=values.device)
    return spread.scatter_add(1, columns.reshape(batch, -1), (values * real).float().reshape(batch, -1))


def step_attention(step: DecoderStep) -> Attention:
    """The next layer's attention on what this one gives, and after the last layer its own."""
    return step.attention if step.next_attention is None else step.next_attention
