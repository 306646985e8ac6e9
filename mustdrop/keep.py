"""The answer of a reducer that chooses: which tokens go on, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mustdrop import ops
from mustdrop.tokens import ImageFacts, PromptFacts, Tokens

Counts = int | Sequence[Sequence[int]]


@dataclass
class Keep:
    """Which vision tokens go on after a decoder layer. Made by `Keep.top` or `Keep.where`; text goes on in any case.

    Whether the host knows how many tokens go on is nobody's business but this class's: after `top` it does, after
    `where` it reads the numbers once. Protected tokens stay whatever the answer is.

    Attributes
    ----------
    score : `[batch, length]` or None
        How good each token is.
    counts : int or sequence of sequence of int or None
        The tokens that go on of every image, or of each image of each prompt; an image that has fewer keeps all.
    mask : bool `[batch, length]` or None
        Instead of the two: True for tokens that go on.
    states : `[batch, length, width]` or None
        States that take the place of the layer's output: those of merged tokens are a method's own.
    merge_into : int64 `[batch, length]` or None
        Column of the token that each token was merged into, which stands for its patches from now on; its own column
        for all others.
    order : int `[batch, length]` or None
        Sort key of the tokens that go on; by default they keep their order.
    """

    score: Tensor | None = None
    counts: Counts | None = None
    mask: Tensor | None = None
    states: Tensor | None = None
    merge_into: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def top(cls, score: Tensor, counts: Counts, **more: Tensor | None) -> Keep:
        """The best tokens of every image by a score `[batch, length]`; of equally good ones the first."""
        return cls(score=score, counts=counts, **more)

    @classmethod
    def where(cls, mask: Tensor, **more: Tensor | None) -> Keep:
        """The tokens of a mask, bool `[batch, length]`."""
        return cls(mask=mask, **more)

    def choose(self, tokens: Tokens) -> tuple[Tensor, tuple[PromptFacts, ...]]:
        """Which positions go on, bool `[batch, length]`, and what is then known of every prompt.

        Raises
        ------
        ValueError
            If the answer does not fit the tokens.
        """
        self._check(tokens)
        prompts = tokens.facts()
        if self.mask is not None:
            stays = self.mask | ~tokens.vision | tokens.protected
            image = tokens.image.masked_fill(~stays, -1)
            counts = ops.tokens_per_image(image, tokens.images).tolist()
        else:
            counts = [self._wanted(number, prompt) for number, prompt in enumerate(prompts)]
            score = self.score.masked_fill(tokens.protected, float("inf"))
            stays = ops.top_per_image(score, tokens.image, padded(counts, tokens.images, score.device))
            stays = stays | ~tokens.vision
        return stays, tuple(prompt.with_tokens(own) for prompt, own in zip(prompts, counts, strict=True))

    def _wanted(self, number: int, prompt: PromptFacts) -> list[int]:
        """Tokens that go on of each image of a prompt."""
        wanted = [self.counts] * len(prompt.images) if isinstance(self.counts, int) else self.counts[number]
        pairs = zip(wanted, prompt.images, strict=True)
        return [min(image.tokens, max(count, image.keys)) for count, image in pairs]

    def _check(self, tokens: Tokens) -> None:
        """Raise ValueError unless the answer is one, and for these tokens."""
        if (self.mask is None) == (self.score is None) or (self.score is None) != (self.counts is None):
            raise ValueError("Keep: give a mask, or a score and counts: Keep.where(mask) or Keep.top(score, counts)")
        for name in ("score", "mask", "merge_into", "order"):
            value = getattr(self, name)
            if value is not None and value.shape != tokens.image.shape:
                found, right = list(value.shape), list(tokens.image.shape)
                raise ValueError(f"Keep: {name} has shape {found}, the tokens have {right}")
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise ValueError(f"Keep: mask is {self.mask.dtype}, it must be bool; scores belong in Keep.top")
        wanted = [self.counts] if isinstance(self.counts, int) else [n for own in self.counts or () for n in own]
        if any(count < 0 for count in wanted):
            raise ValueError(f"Keep: counts are {self.counts}, they must be 0 or more")


def each_image(tokens: Tokens, count: Callable[[ImageFacts], int]) -> list[list[int]]:
    """A number for each image of each prompt, from what the host knows of it."""
    return [[count(image) for image in prompt.images] for prompt in tokens.facts()]


def padded(counts: Sequence[Sequence[int]], images: int, device: torch.device) -> Tensor:
    """Numbers for each image of each prompt as int64 `[batch, images]`, zero where a prompt has fewer images."""
    return torch.tensor([[*own, *[0] * (images - len(own))] for own in counts], device=device)
