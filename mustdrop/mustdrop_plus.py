"""MustDrop+, our improved MustDrop: known numbers of tokens, and fewer of them for what repeats others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mustdrop.checks import require
from mustdrop.mustdrop import MustDrop

DIVERSE = 2  # times `retain`: tokens that enter the decoder


@dataclass
class MustDropPlus(MustDrop):
    """MustDrop by numbers, with three changes of our own; docs/methods.md has what each of them gains.

    Tokens that repeat others do not enter the decoder (`diverse`), fewer tokens are fixed before the text is asked
    (`key_rate`), and their numbers fall more from filter to filter (`taper`). The scores are the published ones.

    Parameters
    ----------
    retain : int
        Mean vision tokens per decoder layer and image, by the authors' meter. All tokens or more: nothing is done.
    diverse : int, optional
        Tokens of every image that enter the decoder. Default: twice `retain`.
    key_rate, taper : float
        As in `MustDrop`, whose other fields are there too.

    Raises
    ------
    ValueError
        With one line that names the field, the value and what would be right.
    """

    thresholds: ClassVar[Mapping[str, float]] = {}

    retain: int = 64
    key_rate: float = 0.02
    taper: float = 0.25

    def __post_init__(self) -> None:
        require(self.compat == "default", "compat", self.compat, "default: there is no authors' code of mustdrop_plus")
        require(self.retain > 0, "retain", self.retain, "1 or more")
        if self.diverse is None and "vision" in self.stages:
            self.diverse = DIVERSE * self.retain
        super().__post_init__()
