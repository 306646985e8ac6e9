"""PyramidDrop (arXiv 2410.17247): fewer vision tokens stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from mustdrop.checks import check_layers, one_of, require
from mustdrop.hooks import DecoderStep
from mustdrop.methods.layerwise import LayerwiseDrop, layer_number
from mustdrop.retain import check_retain, tokens_of

PUBLISHED = {8 / 32: 0.5, 16 / 32: 0.25, 24 / 32: 0.125}  # first layer of a stage, as a share of the depth: tokens
LAYERS_TO_SOLVE_FOR = (2 / 32, 8 / 32, 16 / 32)  # the published ones see too much to reach a ninth of the tokens


@dataclass
class PyramidDrop(LayerwiseDrop):
    """PyramidDrop.

    Before some decoder layers, each image keeps a share of the tokens it entered with: those that the prompt's last
    token would attend to most in the layer to come (its norm and projections, mean over heads).

    Parameters
    ----------
    layers : sequence of int or float, optional
        First layer of each stage but the first; floats are fractions of the depth. Default: 8, 16, 24 of 32 layers,
        and 2, 8, 16 where `retain` is given.
    ratios : sequence of float, optional
        Shares kept in these stages. Default: 0.5, 0.25, 0.125.
    retain : int or float, optional
        Instead of `ratios`: mean vision tokens per decoder layer and image, by the authors' meter; a float is a share
        of the image's patches. The stages then keep lambda, lambda^2, lambda^3, ...
    compat : {"default", "official"}
        "official": positions are renumbered after every drop, a generated token's position is the layer's cache length,
        attention is averaged in the model's precision.

    Raises
    ------
    ValueError
        If a setting is out of range, or `retain` out of reach.
    """

    layers: Sequence[int | float] | None = None
    ratios: Sequence[float] | None = None
    retain: int | float | None = None
    compat: str = "default"

    def __post_init__(self) -> None:
        one_of("compat", self.compat, ("default", "official"))
        official = self.compat == "official"
        self.positions = "renumber" if official else "original"
        self.decode_positions = "cache_length" if official else "continue"
        retain = self.retain
        check_retain(retain)
        for field, given in (("layers", self.layers), ("ratios", self.ratios)):
            require(given is None or len(given) > 0, field, given, "at least one")
        require(retain is None or self.ratios is None, "retain", retain, "left out where ratios are given")
        if retain is None:
            ratios, stages = self._ratios(), self._layers()
            falling = all(now >= then for now, then in pairwise((1, *ratios, 0)))
            require(falling, "ratios", self.ratios, "shares between 0 and 1 that do not rise")
            require(len(ratios) == len(stages), "ratios", self.ratios, f"as many as layers, {len(stages)}")

    def check(self, layers: int, blocks: int) -> None:
        check_layers("layers", self.layers or (), layers, least=1)

    def asks_after(self, layers: int) -> list[int]:
        return [layer_number(layer, layers) - 1 for layer in self._layers()]

    def schedule(self, layers: int, tokens: int, patches: int | None = None) -> dict[int, int]:
        after = self.asks_after(layers)
        if self.retain is None:
            return dict(zip(after, (int(tokens * ratio) for ratio in self._ratios()), strict=True))

        def stages(share: float) -> dict[int, int]:
            return {layer: max(1, round(tokens * share**power)) for power, layer in enumerate(after, 1)}

        return self.solve(tokens_of(self.retain, patches or tokens), layers, tokens, patches, stages)

    def score(self, step: DecoderStep) -> Tensor:
        return self.mean_over_heads(step.next_attention, step.tokens.last_row(), step.hidden.dtype)[:, 0]

    def _layers(self) -> Sequence[int | float]:
        return self.layers or (tuple(PUBLISHED) if self.retain is None else LAYERS_TO_SOLVE_FOR)

    def _ratios(self) -> Sequence[float]:
        return self.ratios or tuple(PUBLISHED.values())
