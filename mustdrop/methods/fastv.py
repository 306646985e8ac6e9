"""FastV (arXiv 2403.06764): after a few layers, keep the vision tokens that the last token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mustdrop.checks import require
from mustdrop.hooks import DecoderStep
from mustdrop.methods.layerwise import SingleDrop


@dataclass
class FastV(SingleDrop):
    """FastV.

    Before one decoder layer, each image keeps the tokens that the prompt's last token attends to most in the layer
    before it, mean over heads. They keep their order and their positions. `layer`, `retain` as in `SingleDrop`.

    Parameters
    ----------
    drop_ratio : float, optional
        Share of an image's tokens to drop. Default: 0.5.
    compat : {"default", "official"}
        "official": attention is averaged in the model's precision. Otherwise the two are the same: what the authors
        published with a key-value cache keeps the first token's selection, and nothing twice.
    """

    drop_ratio: float | None = None

    instead: ClassVar[str] = "drop_ratio"

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio = self.drop_ratio
        require(ratio is None or 0 <= ratio < 1, "drop_ratio", ratio, "0 or more and below 1")

    def kept(self, tokens: int) -> int:
        return round(tokens * (1 - (0.5 if self.drop_ratio is None else self.drop_ratio)))

    def score(self, step: DecoderStep) -> Tensor:
        return self.mean_over_heads(step.attention, step.tokens.last_row(), step.hidden.dtype)[:, 0]
