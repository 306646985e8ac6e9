"""What methods share that keep a number of tokens of every image before the decoder."""

from __future__ import annotations

from typing import ClassVar

from mustdrop.hooks import Reducer, VisionTokens
from mustdrop.retain import check_per, check_retain, tokens_of


class Retaining(Reducer):
    """Base of methods with a field `retain`, the tokens that stay of an image with all its views.

    `retain` is a count, or a share of the image's patches (a float); None leaves the number to the method. A method
    that chooses in the vision encoder has a field `per`, too: with "view", every tile or frame keeps so many.
    """

    retain: int | float | None = None
    per: str = "image"
    least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_retain(self.retain, self.least)
        check_per(self.per)

    def kept(self, patches: int, tokens: int) -> int:
        """Tokens that stay of the `tokens` that there are of an image."""
        return min(tokens, tokens_of(self.retain, patches, self.least))

    def leaves(self, grid: tuple[int, int], tokens: int) -> int | None:
        return None if self.retain is None else self.kept(grid[0] * grid[1], tokens)

    def counts(self, tokens: VisionTokens) -> list[int] | None:
        """Tokens of every row that stay; None where that is all."""
        counts = tokens.divided(self.kept, self.per)
        return None if counts == list(tokens.known_lengths) else counts
