"""FastV (arXiv 2403.06764): after a few layers, keep the vision tokens that the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mustdrop.checks import one_of, require
from mustdrop.hooks import DecoderStep
from mustdrop.methods.layerwise import SingleDrop


@dataclass
class FastV(SingleDrop):
    """FastV.

    Before one decoder layer, each image keeps the tokens that the prompt's last token attends to most in the layer
    before it, mean over heads. They keep their order and their positions.

    Parameters
    ----------
    layer : int or float, optional
        The first layer that sees fewer tokens; a float is a fraction of the depth. Default: 2 of 32 layers.
    drop_ratio : float, optional
        Share of an image's tokens to drop. Default: 0.5.
    retain : int, optional
        Instead of `drop_ratio`: mean vision tokens per decoder layer and image, by the authors' meter.
    compat : {"default", "official"}
        "official": attention is averaged in the model's precision. Otherwise the two are the same: what the authors
        published with a key-value cache keeps the first token's selection, and nothing twice.

    Raises
    ------
    ValueError
        If a setting is out of range, or `retain` out of reach.
    """

    layer: int | float | None = None
    drop_ratio: float | None = None
    retain: int | None = None
    compat: str = "default"
    by_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("compat", self.compat, ("default", "official"))
        ratio, retain = self.drop_ratio, self.retain
        require(ratio is None or 0 <= ratio < 1, "drop_ratio", ratio, "0 or more and below 1")
        require(retain is None or retain > 0, "retain", retain, "1 or more")
        require(retain is None or ratio is None, "retain", retain, "left out where drop_ratio is given")

    def kept(self, tokens: int) -> int:
        return round(tokens * (1 - (0.5 if self.drop_ratio is None else self.drop_ratio)))

    def score(self, step: DecoderStep) -> Tensor:
        return self.mean_over_heads(step.attention, step.tokens.last_row(), step.hidden.dtype)[:, 0]
