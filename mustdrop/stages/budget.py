"""Exact token counts instead of thresholds: which numbers each stage works to, known before anything is computed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

from mustdrop.checks import require
from mustdrop.retain import at_least, check_retain, tokens_of

MERGED_SHARE = 0.65  # of the patches: what the published threshold leaves of the embedded model's images
TAPER = 0.73  # what the last filter leaves of what the first left: as the published thresholds do


@dataclass(frozen=True)
class Budget:
    """The numbers of one image at every stage, solved for its own size.

    Attributes
    ----------
    windows : int
        Windows that merge.
    merged, keys : int
        Tokens that merging leaves, and the key tokens among them.
    entering : int
        Tokens that enter the decoder.
    after : mapping of int to int
        Decoder layer -> tokens that go on after it.
    """

    windows: int
    merged: int
    keys: int
    entering: int
    after: Mapping[int, int]


@dataclass(frozen=True)
class Target:
    """What is asked of the stages in numbers; what is None is left to thresholds, or to `retain`.

    Attributes
    ----------
    window, key_rate
        Of merging and of the key tokens.
    merge_to : int or float, optional
        Tokens that merging leaves; a float is a share of the image's patches.
    retain : int or float, optional
        Mean vision tokens per decoder layer by the authors' meter; says how much is merged, and what the filters leave.
    diverse : int or float, optional
        Tokens that enter the decoder.
    diverse_times : int, optional
        Instead: as a multiple of `retain`.
    budget : tuple of int or float, optional
        Tokens that go on after each filter layer.
    taper : float
        With `retain`: what the last filter leaves of what the first left.
    """

    window: int = 3
    key_rate: float = 0.0
    merge_to: int | float | None = None
    retain: int | float | None = None
    diverse: int | float | None = None
    diverse_times: int | None = None
    budget: tuple[int | float, ...] | None = None
    taper: float = TAPER

    @property
    def merges(self) -> bool:
        """Whether numbers, not the threshold, decide how much is merged."""
        return self.merge_to is not None or self.retain is not None

    @property
    def filters(self) -> bool:
        """Whether numbers, not the thresholds, decide how many tokens go on in the decoder."""
        return self.budget is not None or self.retain is not None

    def solve(self, patches: int, **known: Any) -> Budget:
        """The budget of an image of so many patches; see `solved`."""
        return solved(self, patches, **known)


@lru_cache(maxsize=1024)
def solved(
    target: Target,
    patches: int,
    *,
    grid: tuple[int, int] | None = None,
    tokens: int | None = None,
    keys: int | None = None,
    after: tuple[int, ...] = (),
    layers: int = 0,
    strict: bool = False,
) -> Budget:
    """The budget of an image, solved once for its size.

    Parameters
    ----------
    target : Target
        What is asked.
    patches : int
        Of the image, all its views together.
    grid : (rows, columns), optional
        Of a view; without it nothing is merged.
    tokens, keys : int, optional
        What there really is, where it is known: tokens that are left of the image, and key tokens. Default: what the
        target leaves.
    after : tuple of int
        Filter layers of a decoder that is `layers` deep.
    strict : bool
        Whether numbers that are out of reach are an error; otherwise the nearest are taken.

    Raises
    ------
    ValueError
        If whole windows cannot give `merge_to`, or `strict` and numbers are out of reach.
    """
    mean = None if target.retain is None else tokens_of(target.retain, patches)
    windows = windows_to_merge(target.merge_to, mean, grid, patches, target.window) if grid and target.merges else 0
    merged = patches - windows * (target.window**2 - 1) if tokens is None else tokens
    if keys is None:
        keys = 0 if mean is not None and mean >= patches else ceil(target.key_rate * merged)
    diverse = patches if target.diverse is None else tokens_of(target.diverse, patches)
    if target.diverse_times and mean is not None:
        diverse = target.diverse_times * mean
    entering = min(merged, max(keys, diverse))
    filters = {}
    if target.filters and after:
        numbers = target.budget, mean, target.taper, strict, target.retain
        filters = filter_schedule(after, layers, patches, entering, keys, *numbers)
    return Budget(windows, merged, keys, entering, filters)


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
        Of a view.
    patches : int
        Of the image, all its views together.
    window : int
        Side of a window.

    Raises
    ------
    ValueError
        If whole windows cannot give `merge_to`.
    """
    absorbed, views = window * window - 1, patches // (grid[0] * grid[1])
    windows = views * (grid[0] // window) * (grid[1] // window)
    if merge_to is None:
        if retain is None or retain >= patches:
            return 0
        wanted = round((1 - MERGED_SHARE) * patches / absorbed)
        return min(wanted, windows, (patches - retain) // absorbed)
    least = patches - windows * absorbed
    right = f"between {least} (every window merged) and {patches} (none), a multiple of {absorbed} below {patches}"
    gone = patches - tokens_of(merge_to, patches, least=0)
    merged = round(gone / absorbed) if isinstance(merge_to, float) else gone // absorbed
    exact = isinstance(merge_to, float) or gone == merged * absorbed
    require(0 <= merged <= windows and exact, "merge_to", merge_to, right)
    return merged


@lru_cache(maxsize=256)
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
    given: int | float | None = None,
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
    given : int or float, optional
        What the user gave for `retain`, in whose words errors speak. Default: the number itself.
    """
    if budget is not None:
        counts = [tokens_of(number, patches, least=0) for number in budget]
        for number, count in zip(budget, counts, strict=True):
            right = f"from {keys} (key tokens are never dropped) to {entering} (tokens that enter the decoder)"
            require(not strict or keys <= count <= entering, "budget", number, right)
        return {layer: min(entering, max(keys, count)) for layer, count in zip(after, counts, strict=True)}
    given = retain if given is None else given
    right = f"at most {entering}, the tokens that enter the decoder, or all {patches}; a larger merge_to raises that"
    require(not strict or retain <= entering or retain >= patches, "retain", given, right)
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

    right = f"{at_least(given, mean(0), patches)}: key tokens stay, and the first layers see all {entering} that enter"
    right += "; a smaller merge_to, diverse or key_rate lowers that"
    require(not strict or retain >= mean(0), "retain", given, right)
    above = bisect_left(range(ceil(entering / shares[-1])), retain, key=mean)
    return schedule(min((above, max(above - 1, 0)), key=lambda first: abs(mean(first) - retain)))


def check_budget(target: Target, filters: int) -> None:
    """Raise ValueError unless the numbers make sense whatever the model, for so many filters."""
    retain, budget = target.retain, target.budget
    check_retain(retain)
    check_retain(target.diverse, field="diverse")
    require(0 < target.taper <= 1, "taper", target.taper, "more than 0 and at most 1")
    require(retain is None or budget is None, "retain", retain, "left out where budget is given")
    if budget is not None:
        budget = list(budget)
        require(len(budget) == filters, "budget", budget, f"as many numbers as there are filter layers, {filters}")
        for number in budget:
            fits = 0 <= number <= 1 if isinstance(number, float) else number >= 0
            require(fits, "budget", number, "a number of tokens, or a share of the patches between 0 and 1")
        falling = all(type(now) is type(then) and now >= then for now, then in zip(budget, budget[1:], strict=False))
        require(falling, "budget", budget, "numbers that do not rise, all whole or all shares")
