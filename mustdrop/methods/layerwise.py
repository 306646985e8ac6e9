"""What methods share that drop vision tokens inside the decoder: how many stay after which layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mustdrop import ops
from mustdrop.checks import check_layers, one_of, require
from mustdrop.hooks import Attention, DecoderStep, ImageFacts, Keep, Reducer
from mustdrop.retain import at_least, check_retain, tokens_of


class Stage(NamedTuple):
    """What a schedule means for an image at one of its layers: tokens before, kept as they are, and after the drop."""

    before: int
    kept: int
    after: int


class LayerwiseDrop(Reducer):
    """Base of methods that rank the vision tokens after some decoder layers and keep the best of every image.

    A method says how many tokens of an image stay after which layer (`schedule`) and how good a token is (`score`).
    Numbers go by the tokens with which an image itself entered the decoder, whatever its neighbours in the batch have.
    """

    retain: int | float | None = None
    compat: str = "default"

    def schedule(self, layers: int, tokens: int, patches: int | None = None) -> dict[int, int]:
        """Decoder layer -> tokens of an image that stay after it, for images of `tokens` vision tokens.

        A share is one of the image's `patches`, by default as many. Raises ValueError if `retain` is out of reach.
        """
        raise NotImplementedError

    def score(self, step: DecoderStep) -> Tensor:
        """How good each token is, float `[batch, length]`; only vision tokens are looked at."""
        raise NotImplementedError

    def drops_after(self, layers: int, tokens: int, patches: int | None = None) -> set[int]:
        stages = self.stages(self.schedule(layers, tokens, patches), tokens)
        return {layer for layer, stage in stages.items() if stage.before > stage.kept}

    def added(self, dropped: int) -> int:
        """Tokens that a method makes out of so many dropped ones."""
        return 0

    def check_tokens(self, layers: int, tokens: int) -> None:
        self.check_counts(layers, (1, tokens), tokens)

    def check_counts(self, layers: int, grid: tuple[int, int], tokens: int, keys: int = 0) -> None:
        self.schedule(layers, tokens, grid[0] * grid[1])

    def expected(self, layers: int, tokens: int) -> float:
        """Vision tokens per decoder layer, a layer counting after its drop (the authors' meter)."""
        return self._mean(self.schedule(layers, tokens), layers, tokens)

    def after_decoder_layer(self, step: DecoderStep) -> Keep | None:
        known = step.scratch.setdefault("stages", {})

        def stage(image: ImageFacts) -> Stage | None:
            size = image.tokens_in, image.patches
            if size not in known:
                known[size] = self.stages(self.schedule(step.layers, *size), image.tokens_in)
            return known[size].get(step.layer)

        stages = [[stage(image) for image in prompt.images] for prompt in step.tokens.facts()]
        return self.keep(step, stages) if any(one for own in stages for one in own) else None

    def keep(self, step: DecoderStep, stages: list[list[Stage | None]]) -> Keep:
        """What goes on after a layer: the best tokens, as many as the `stages` of the prompts' images say."""
        return Keep.top(self.score(step), self.wanted(step, stages))

    def wanted(self, step: DecoderStep, stages: list[list[Stage | None]]) -> list[list[int]]:
        """Tokens of each image that stay as they are; all of an image that has no stage at this layer."""
        return [
            [min(image.tokens, stage.kept if stage else image.tokens) for stage, image in zip(own, images, strict=True)]
            for own, images in zip(stages, (prompt.images for prompt in step.tokens.facts()), strict=True)
        ]

    def stages(self, schedule: dict[int, int], tokens: int) -> dict[int, Stage]:
        """What a schedule means layer by layer."""
        stages = {}
        for layer in sorted(schedule):
            kept = min(tokens, schedule[layer])
            stages[layer] = Stage(tokens, kept, kept + self.added(tokens - kept))
            tokens = stages[layer].after
        return stages

    def solve(
        self, retain: int, layers: int, tokens: int, patches: int | None, schedule: Callable[[float], dict[int, int]]
    ) -> dict[int, int]:
        """The schedule whose mean comes closest to `retain`.

        Parameters
        ----------
        retain : int
            Wanted mean of vision tokens per decoder layer and image, by the authors' meter; no drop if an image has no
            more.
        layers, tokens, patches : int
            Of the decoder, and of an image.
        schedule : callable, float in [0, 1] -> schedule
            Keeps more tokens the larger its argument; at 0 the fewest there can be, at 1 all.

        Raises
        ------
        ValueError
            If the layers before the first drop alone see more than `retain`.
        """
        if retain >= tokens:
            return {}
        least = self._mean(schedule(0.0), layers, tokens)
        given, method = self.retain or retain, type(self).__name__
        right = f"{at_least(given, least, patches or tokens)} for {method}"
        right += f": its first layers see all {tokens} tokens ({layers} layers)"
        require(retain >= least, "retain", given, right)
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean(schedule(middle), layers, tokens) <= retain else (low, middle)
        return min(schedule(low), schedule(high), key=lambda one: abs(self._mean(one, layers, tokens) - retain))

    def _mean(self, schedule: dict[int, int], layers: int, tokens: int) -> float:
        stages, total = self.stages(schedule, tokens), 0
        for layer in range(layers):
            tokens = stages[layer].after if layer in stages else tokens
            total += tokens
        return total / layers

    def mean_over_heads(self, attention: Attention, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Attention of some rows `[batch, rows, length]`; the authors' codes average in the model's precision."""
        probabilities = attention.probabilities(rows)
        return (probabilities.to(dtype) if self.compat == "official" else probabilities).mean(1)


@dataclass
class SingleDrop(LayerwiseDrop):
    """Base of methods that drop once inside the decoder; how many stay is `kept`, or what `retain` makes of it.

    Parameters
    ----------
    layer : int or float, optional
        The first layer that sees fewer tokens; a float is a fraction of the depth. Default: 2 of 32 layers.
    retain : int or float, optional
        Instead of what says how many stay: mean vision tokens per decoder layer and image, by the authors' meter; a
        float is a share of the image's patches.
    compat : {"default", "official"}
        "official" reproduces the authors' code.

    Raises
    ------
    ValueError
        If a setting is out of range, or `retain` out of reach.
    """

    layer: int | float | None = None
    retain: int | float | None = field(default=None, kw_only=True)
    compat: str = field(default="default", kw_only=True)

    instead: ClassVar[str] = ""  # the field that says how many stay without `retain`

    def __post_init__(self) -> None:
        one_of("compat", self.compat, ("default", "official"))
        check_retain(self.retain)
        alone = self.retain is None or getattr(self, self.instead) is None
        require(alone, "retain", self.retain, f"left out where {self.instead} is given")

    def kept(self, tokens: int) -> int:
        """Tokens that stay of an image of so many, without `retain`."""
        raise NotImplementedError

    def check(self, layers: int, blocks: int) -> None:
        if self.layer is not None:
            check_layers("layer", [self.layer], layers, least=1)

    def asks_after(self, layers: int) -> list[int]:
        return [layer_number(2 / 32 if self.layer is None else self.layer, layers) - 1]

    def schedule(self, layers: int, tokens: int, patches: int | None = None) -> dict[int, int]:
        (after,) = self.asks_after(layers)
        if self.retain is None:
            return {after: self.kept(tokens)}
        retain = tokens_of(self.retain, patches or tokens)
        return self.solve(retain, layers, tokens, patches, lambda share: {after: max(1, round(share * tokens))})


def layer_number(layer: int | float, layers: int) -> int:
    """The layer before which tokens are dropped; one layer at least has seen them all."""
    return max(1, ops.layer_index(layer, layers))
