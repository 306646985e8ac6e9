"""TOPS (arXiv 2606.27161): relevant, different and covering tokens, by one rule before and inside the decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mustdrop.checks import require
from mustdrop.compose import Compose
from mustdrop.greedy import Coverage, Nearest, cosines, in_turn
from mustdrop.hooks import DecoderStep, Keep, VisionStep, gather
from mustdrop.methods.two_stages import Entrance, Inside, at_columns, by_image, of_text
from mustdrop.retain import check_retain

STAGES = {12 / 32: 1.0, 24 / 32: 0.25}  # first layer, as a share of the depth: tokens, in units of the paper's number
ENTER = 2.0
MEAN = (12 * ENTER + 12 * 1.0 + 8 * 0.25) / 32  # tokens per layer, in these units


@dataclass
class TOPS(Compose):
    """TOPS.

    Tokens are chosen one after the other: first the most relevant, then the largest sum of relevance, of difference
    from the chosen ones (`alpha` times) and of what is added to the coverage of the image (`weights` times), each in
    units of its mean over the tokens left. After the projector relevance is what CLS paid a token in the last vision
    block (all tokens, where there is no CLS), and twice the paper's number enter; from layers 12 and 24 of 32 on, once
    and a quarter of it stay, relevance being the mean attention of the text after the first image.

    Parameters
    ----------
    tokens : int, optional
        The paper's number. Default: 64, which is a mean of 76 per layer.
    retain : int or float, optional
        Instead: mean vision tokens per decoder layer and image with all its views; a float is a share of its patches.
    alpha : float
        Weight of difference.
    weights : sequence of float
        Weight of coverage after the projector and at the two layers.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """

    tokens: int | None = None
    retain: int | float | None = None
    alpha: float = 0.5
    weights: tuple[float, ...] = (0.5, 0.5, 1.0)

    def __post_init__(self) -> None:
        require(self.tokens is None or self.tokens > 0, "tokens", self.tokens, "1 or more")
        require(self.retain is None or self.tokens is None, "retain", self.retain, "left out where tokens is given")
        check_retain(self.retain)
        require(self.alpha >= 0, "alpha", self.alpha, "0 or more")
        fits = len(self.weights) == 3 and min(self.weights) >= 0
        require(fits, "weights", self.weights, "three numbers of 0 or more, before the decoder and at its two layers")
        unit, number = (1 / MEAN, self.retain) if self.retain is not None else (1.0, self.tokens or 64)
        shares = {first: share * unit for first, share in STAGES.items()}
        first, *later = self.weights
        parts = [
            _ByImage(number, ENTER * unit, self.alpha, first),
            _ByText(number, shares, ENTER * unit, self.alpha, tuple(later)),
        ]
        super().__init__(parts)


@dataclass
class _ByImage(Entrance):
    alpha: float = 0.5
    weight: float = 0.5

    def on_projected_features(self, step: VisionStep) -> Keep | None:
        tokens, counts = step.tokens, self.counts(step.tokens)
        if counts is None:
            return None
        relevance = tokens.notes["cls_attention"]
        turn = by_three(relevance, tokens.patches, max(counts), self.alpha, self.weight, tokens.valid)
        return Keep.top(turn, counts)


@dataclass
class _ByText(Inside):
    alpha: float = 0.5
    weights: tuple[float, ...] = (0.5, 1.0)

    def score(self, step: DecoderStep) -> Tensor:
        attention, real = of_text(step.attention, step.tokens)
        paid = (attention.mean(1) * real[..., None]).sum(1) / real.sum(-1, keepdim=True)
        columns, own = by_image(step.tokens)
        rows = torch.arange(len(columns), device=columns.device) // step.tokens.images
        stage = self.asks_after(step.layers).index(step.layer)
        retain = [
            max(self.schedule(step.layers, image.tokens_in, image.patches).get(step.layer, 0), image.keys)
            for prompt in step.tokens.facts()
            for image in prompt.images
        ]
        states = gather(step.hidden[rows], columns)
        relevance = paid[rows].gather(1, columns)
        turn = by_three(relevance, states, max(retain), self.alpha, self.weights[stage], own)
        return at_columns(turn, columns, own, step.tokens)


def by_three(
    relevance: Tensor, features: Tensor, count: int, alpha: float, weight: float, valid: Tensor | None = None
) -> Tensor:
    """Each token's turn by relevance, difference and coverage (TOPS, algorithm 1), see `greedy.in_turn`.

    `features` `[rows, tokens, width]`, `relevance` and bool `valid` `[rows, tokens]`.
    """
    similarity = cosines(features)
    coverage, nearest, first = Coverage(similarity, valid), Nearest(similarity), [True]
    left = torch.ones_like(relevance) if valid is None else valid.to(relevance.dtype)

    def in_means(values: Tensor) -> Tensor:
        mean = (values * left).sum(-1, keepdim=True) / left.sum(-1, keepdim=True).clamp(min=1)
        return values / mean.clamp(min=torch.finfo(values.dtype).tiny)

    def gain() -> Tensor:
        if first.pop() if first else False:
            return relevance
        return in_means(relevance) + alpha * in_means(1 - nearest.largest) + weight * in_means(coverage.gain())

    def take(pick: Tensor) -> None:
        nonlocal left
        left = left.scatter(1, pick, 0)
        coverage.take(pick)
        nearest.take(pick)

    return in_turn(count, gain, take, valid)
