"""Exact token counts instead of thresholds: which numbers each stage works to, known before anything is computed."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

from mustdrop.checks import require

MERGED_SHARE = 0.65  # of the patches: what the published threshold leaves of the embedded model's images
TAPER = 0.73  # what the last filter leaves of what the first left: as the published thresholds do


def as_count(number: int | float, patches: int) -> int:
    """A number of tokens, given as such or as a share of the patches (float)."""
    return round(number * patches) if isinstance(number, float) else number


def windows_to_merge(
    merge_to: int | float | None, retain: int | None, grid: tuple[int, int], patches: int, window: int
) -> int:
    """How many windows of an image merge.

    Parameters
    ----------
    merge_to : int or float, optional
        Tokens that are left after merging; a float is a share of the patches, and the nearest number that whole windows
        give is taken.
    retain : int, optional
        Without `merge_to`: wanted mean tokens per decoder layer. `MERGED_SHARE` of the patches are left, and never
        fewer than the mean.
    grid : (rows, columns)
    patches : int
    window : int
        Side of a window.

    Raises
    ------
    ValueError
        If whole windows cannot give `merge_to`.
    """
    absorbed, windows = window * window - 1, (grid[0] // window) * (grid[1] // window)
    if merge_to is None:
        if retain is None or retain >= patches:
            return 0
        wanted = round((1 - MERGED_SHARE) * patches / absorbed)
        return min(wanted, windows, (patches - retain) // absorbed)
    least = patches - windows * absorbed
    right = f"between {least} (every window merged) and {patches} (none), a multiple of {absorbed} below {patches}"
    gone = patches - as_count(merge_to, patches)
    merged = round(gone / absorbed) if isinstance(merge_to, float) else gone // absorbed
    exact = isinstance(merge_to, float) or gone == merged * absorbed
    require(0 <= merged <= windows and exact, "merge_to", merge_to, right)
    return merged


@lru_cache(maxsize=64)
def filter_schedule(
    after: tuple[int, ...],
    layers: int,
    patches: int,
    entering: int,
    keys: int,
    budget: tuple[int | float, ...] | None = None,
    retain: int | None = None,
    taper: float = TAPER,
    strict: bool = False,
) -> dict[int, int]:
    """Decoder layer -> vision tokens of an image that go on after it, as near to what is asked as can be.

    Parameters
    ----------
    after : tuple of int
        The filter layers.
    layers, patches, entering, keys : int
        Depth of the decoder; of an image: patches, tokens that enter the decoder, and those that may not be dropped.
    budget : tuple of int or float, optional
        Tokens after each filter layer; floats are shares of the patches.
    retain : int, optional
        Instead: mean tokens per decoder layer by the authors' meter.
    taper : float
        With `retain`: the share that the last filter leaves of what the first left, those between in equal steps on a
        logarithmic scale; key tokens stay in any case.
    strict : bool
        Raise ValueError if these numbers are out of reach.
    """
    if budget is not None:
        counts = [as_count(number, patches) for number in budget]
        for number, count in zip(budget, counts, strict=True):
            right = f"from {keys} (key tokens are never dropped) to {entering} (tokens that enter the decoder)"
            require(not strict or keys <= count <= entering, "budget", number, right)
        return {layer: min(entering, max(keys, count)) for layer, count in zip(after, counts, strict=True)}
    right = f"at most {entering}, the tokens that enter the decoder, or all {patches}; a larger merge_to raises that"
    require(not strict or retain <= entering or retain >= patches, "retain", retain, right)
    if retain >= entering:
        return {}
    shares = [taper ** (number / max(1, len(after) - 1)) for number in range(len(after))]

    def schedule(first: int) -> dict[int, int]:
        counts = (min(entering, max(keys, round(first * share))) for share in shares)
        return dict(zip(after, counts, strict=True))

    def mean(first: int) -> float:
        counts, left, total = schedule(first), entering, 0
        for layer in range(layers):
            left = counts.get(layer, left)
            total += left
        return total / layers

    right = f"at least {math.ceil(mean(0))}: key tokens stay, and the first layers see all {entering} that enter"
    right += "; a smaller merge_to, diverse or key_rate lowers that"
    require(not strict or retain >= mean(0), "retain", retain, right)
    above = bisect_left(range(math.ceil(entering / shares[-1])), retain, key=mean)
    return schedule(min((above, max(above - 1, 0)), key=lambda first: abs(mean(first) - retain)))


def key_count(rate: float, tokens: int) -> int:
    """Size of the key token set of an image with so many tokens."""
    return math.ceil(rate * tokens)


def check_budget(budget: Sequence[int | float] | None, retain: int | None, filters: int) -> None:
    """Raise ValueError unless the settings make sense whatever the model."""
    require(retain is None or retain > 0, "retain", retain, "1 or more")
    require(retain is None or budget is None, "retain", retain, "left out where budget is given")
    if budget is not None:
        require(len(budget) == filters, "budget", budget, f"as many numbers as there are filter layers, {filters}")
        for number in budget:
            fits = 0 <= number <= 1 if isinstance(number, float) else number >= 0
            require(fits, "budget", number, "a number of tokens, or a share of the patches between 0 and 1")
        falling = all(type(now) is type(then) and now >= then for now, then in zip(budget, budget[1:], strict=False))
        require(falling, "budget", budget, "numbers that do not rise, all whole or all shares")
