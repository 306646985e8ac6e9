"""MustDrop+, our improved MustDrop: known numbers of tokens, and fewer of them for what repeats others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mustdrop.checks import require
from mustdrop.mustdrop import MustDrop


@dataclass
class MustDropPlus(MustDrop):
    """MustDrop by numbers, with three changes of our own; docs/methods.md has what each of them gains.

    Tokens that repeat others do not enter the decoder (`diverse`), fewer tokens are fixed before the text is asked
    (`key_rate`), and their numbers fall more from filter to filter (`taper`). The scores are the published ones.

    Parameters
    ----------
    retain : int or float
        Mean vision tokens per decoder layer and image with all its views, by the authors' meter; a float is a share of
        the image's patches. All tokens or more: nothing is done.
    diverse : int or float, optional
        Tokens of every image that enter the decoder. Default: twice `retain`.
    key_rate, taper : float
        As in `MustDrop`, whose other fields are there too.

    Raises
    ------
    ValueError
        With one line that names the field, the value and what would be right.
    """

    thresholds: ClassVar[Mapping[str, float]] = {}
    diverse_times: ClassVar[int | None] = 2

    retain: int | float = 64
    key_rate: float = 0.02
    taper: float = 0.25

    def __post_init__(self) -> None:
        require(self.compat == "default", "compat", self.compat, "default: there is no authors' code of mustdrop_plus")
        known = not isinstance(self.retain, float)  # twice a share is only known of an image
        if self.diverse is None and "vision" in self.stages and known:
            self.diverse = self.diverse_times * self.retain
        super().__post_init__()
