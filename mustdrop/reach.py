"""What reducers say before anything runs: whether their settings fit a model, alone and beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mustdrop.checks import shown

COUNTED = ("on_pixels", "inside_vision_block", "after_vision_block", "on_projected_features", "on_instruction")


@dataclass(frozen=True)
class Tower:
    """A vision tower: its ViT blocks, how many of them are run, and the rows and columns of an image's patches.

    In `windowed` blocks a token sees those of its window alone.
    """

    blocks: int
    run: int
    grid: tuple[int, int]
    windowed: frozenset[int] = frozenset()

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def last(self) -> int:
        """The last block that is run."""
        return self.run - 1

    def check_compares(self, field: str, value: int | float, block: int) -> None:
        """Raise ValueError if the attention of a block, which a field names, tells nothing of tokens apart."""
        if block in self.windowed:
            right = ", ".join(str(other) for other in range(self.blocks) if other not in self.windowed)
            raise ValueError(
                f"{field} is {shown(value)}: it must be one of {right}, for in block {block} of this vision tower "
                "a token sees its window alone, and attention compares no tokens of different windows"
            )


TOUCHED = "inside", "changes", "reads", "reads_next"


@dataclass(frozen=True)
class Touch:
    """What a reducer does in which steps of a vision tower, by block.

    `inside`: merges between a block's attention and its MLP, by that attention. `changes`: merges or drops after the
    block. `reads`: asks for the block's own attention. `reads_next`: asks for the next block's, on the present tokens.
    `needs_all`: takes one token per patch for granted.
    """

    inside: frozenset[int] = frozenset()
    changes: frozenset[int] = frozenset()
    reads: frozenset[int] = frozenset()
    reads_next: frozenset[int] = frozenset()
    needs_all: bool = False

    def before(self, block: int) -> bool:
        """Whether anything has changed when this block's step ends, apart from what is done after the block."""
        return any(inside <= block for inside in self.inside) or any(after < block for after in self.changes)


class Fitting:
    """Base of `Reducer`: what it asks of a model, and what it means for reducers beside it.

    Attributes
    ----------
    counts_at : str
        One of `COUNTED`, the hook at which it meets the tokens that its settings are about.
    """

    counts_at: ClassVar[str] = "on_projected_features"

    def check(self, layers: int, blocks: int) -> None:
        """Raise ValueError if the settings do not fit a model of `layers` decoder layers and `blocks` ViT blocks."""

    def check_heads(self, heads: int) -> None:
        """Raise ValueError if the settings do not fit a decoder with so many attention heads."""

    def check_tower(self, tower: Tower) -> None:
        """Raise ValueError if the settings do not fit a vision tower."""

    def check_placeholders(self, any_size: bool = False) -> None:
        """Raise ValueError if it cannot work on prompts that have a placeholder for every patch, and for nothing else.

        Such are those of transformers' own classes. `any_size`: images may be of any size, which their processor says.
        """

    def pixel_budget(self, views: int) -> int | None:
        """Tokens that an image of so many views may have, where it is its processor that has to make it so small."""
        return None

    def check_tokens(self, layers: int, tokens: int) -> None:
        """Raise ValueError if the settings are out of reach for images of `tokens` vision tokens."""

    def check_views(self, layers: int, tokens: int, views: int) -> None:
        """As `check_tokens`, for images of so many views (frames of a video) with `tokens` vision tokens each."""
        self.check_tokens(layers, tokens * views)

    def check_counts(self, layers: int, grid: tuple[int, int], tokens: int, keys: int = 0) -> None:
        """As `check_tokens`, where other reducers have left `tokens` of an image's patches, `keys` of them for good."""
        self.check_tokens(layers, tokens)

    def leaves(self, grid: tuple[int, int], tokens: int) -> int | None:
        """Tokens of an image that are left before the decoder of so many, None if that depends on the image."""
        return tokens

    def protects(self, grid: tuple[int, int], tokens: int) -> int:
        """How many of the `tokens` that are left of an image it makes key tokens."""
        return 0

    def shrinks(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the patches that are left of an image."""
        return grid

    def touches(self, tower: Tower) -> Touch:
        """What is done in which steps of the vision tower."""
        return Touch()

    def drops_after(self, layers: int, tokens: int, patches: int | None = None) -> set[int]:
        """Decoder layers after which tokens may go, of images of which `tokens`, by default all, enter the decoder."""
        return set()

    def merges_after(self, layers: int, tokens: int, patches: int | None = None) -> set[int]:
        """Decoder layers after which tokens may be merged."""
        return set()

    def check_sizes(
        self,
        layers: int,
        blocks: int,
        run: int | None = None,
        patches: int | None = None,
        heads: int | None = None,
        one_view: bool = True,
        views: int = 1,
    ) -> None:
        """All checks against a model's sizes; what is not known of it is not looked at.

        Parameters
        ----------
        layers, blocks : int
            Of the decoder and of the vision tower.
        run : int, optional
            ViT blocks that are run. Default: all.
        patches : int, optional
            Patches of a view, on a square grid.
        heads : int, optional
            Attention heads of a decoder layer.
        one_view : bool
            Whether all images have the same number of views, so that their tokens are known.
        views : int
            That number: 1, or the frames of a video.

        Raises
        ------
        ValueError
            With one line that names the field, the value and what would be right.
        """
        self.check(layers, blocks)
        if heads is not None:
            self.check_heads(heads)
        if patches is not None:
            self.check_tower(Tower(blocks, blocks if run is None else run, square(patches)))
            if one_view:
                self.check_views(layers, patches, views)


def square(patches: int) -> tuple[int, int]:
    """The grid of an image that is as nearly as high as wide as its number of patches allows."""
    rows = next(rows for rows in range(math.isqrt(patches), 0, -1) if patches % rows == 0)
    return rows, patches // rows


def check_steps(parts: Sequence[Fitting], tower: Tower) -> None:
    """Raise ValueError if a reducer's view of the vision tower is spoilt by another one's work.

    Attention belongs to the tokens that a block was given: whoever reads it must not come after somebody who has
    changed them in the same step. Merging windows takes one token per patch.
    """
    touches = [(type(part).__name__, part.touches(tower)) for part in parts]
    for place, (name, mine) in enumerate(touches):
        earlier, others = touches[:place], touches[:place] + touches[place + 1 :]
        first = min(mine.changes, default=0) if mine.needs_all else 0
        spoilers = [
            *(other for other, touch in others if touch.inside & mine.reads),
            *(other for other, touch in earlier if touch.inside & mine.inside),
            *(other for other, touch in earlier if touch.changes & (mine.reads | mine.reads_next)),
            *(other for other, touch in others if mine.needs_all and touch.before(first)),
            *(other for other, touch in earlier if mine.needs_all and first in touch.changes),
        ]
        if spoilers:
            raise ValueError(
                f"parts: {name} cannot work beside {spoilers[0]} there: in the vision tower that one changes tokens of "
                f"which {name} needs the attention, or all"
            )


def check_counts(parts: Sequence[Fitting], layers: int, grid: tuple[int, int], tokens: int) -> None:
    """Raise ValueError if a reducer's numbers are out of reach for what those before it leave of an image.

    Where that depends on the image, they are taken to leave all: of fewer tokens nothing is further out of reach.
    """
    drops, keys = [], 0
    in_decoder = [part for part in parts if part.overrides("after_decoder_layer")]
    others = [part for part in parts if not part.overrides("after_decoder_layer")]
    before = [part for hook in COUNTED for part in others if part.counts_at == hook]
    for part in (*before, *in_decoder):
        part.check_counts(layers, grid, tokens, keys)
        keys = max(keys, part.protects(grid, tokens))
        sizes = layers, tokens, grid[0] * grid[1]
        drops.append((part, part.drops_after(*sizes), part.merges_after(*sizes)))
        grid = part.shrinks(grid)
        left = part.leaves(grid, tokens)
        tokens = tokens if left is None else left
    for part, _, merging in drops:
        if any(merging & dropping for other, dropping, _ in drops if other is not part):
            raise ValueError(
                "parts: after a decoder layer in which one reducer merges tokens no other may drop any: "
                f"{type(part).__name__} merges after {', '.join(map(str, sorted(merging)))}"
            )
