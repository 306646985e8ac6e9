"""How many tokens of an image stay: a count, or a share of its patches, divided over its views."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mustdrop.checks import one_of, require

PER = ("image", "view")


def check_retain(number: int | float | None, least: int = 1, field: str = "retain") -> None:
    """Raise ValueError unless a number is a count of at least so many tokens, a share (a float), or None."""
    share = isinstance(number, float)
    right = f"{least} or more tokens, or a share above 0 and up to 1, such as 0.25"
    require(number is None or (0 < number <= 1 if share else number >= least), field, number, right)


def check_per(per: str) -> None:
    """Raise ValueError unless numbers are said to be per image or per view."""
    one_of("per", per, PER)


def tokens_of(number: int | float, patches: int, least: int = 1, rounded: Callable[[float], int] = round) -> int:
    """The tokens that a count, or a share of an image's `patches`, stands for; no fewer than `least` by a share."""
    return max(least, rounded(number * patches)) if isinstance(number, float) else number


def at_least(number: int | float, tokens: float, patches: int) -> str:
    """The fewest `tokens` that are in reach, in the words of a user who has given a count or a share."""
    fewest = -int(-tokens // 1)
    if not isinstance(number, float):
        return f"at least {fewest}"
    return f"at least {-(-fewest * 1000 // patches) / 1000:g}, {fewest} of {patches} tokens"


def apportioned(total: int, sizes: Sequence[int]) -> list[int]:
    """A number divided in proportion to some sizes, none getting more than its size; largest remainders are rounded up.

    The parts add up to `total`, or to all there is. Of equal remainders the first is rounded up.
    """
    whole = sum(sizes)
    if total >= whole:
        return list(sizes)
    parts = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda place: -(total * sizes[place] % whole))
    for place in by_remainder[: total - sum(parts)]:
        parts[place] += 1
    return parts
