"""Finding the settings at which a method keeps a wanted number of vision tokens.

The search knows no model: it turns one number, and somebody else measures. The command ``mustdrop calibrate`` brings
model and samples.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mustdrop.checks import shown
from mustdrop.registry import METHODS

RANGE = {"thresholds": (1e-6, 1e2), "retain": (0.25, 4.0)}
"""Scales that are tried: of thresholds on attention shares, nothing and everything droppable falls below them."""

STEPS = 16


@dataclass(frozen=True)
class Point:
    """Token counts, means over the samples, at one scale of the thresholds."""

    scale: float
    tokens: float
    tokens_official: float


class OutOfReach(ValueError):
    """No scale of the thresholds gives the wanted number."""


def kind_of_setting(method: str) -> str:
    """``thresholds`` if a method's thresholds are turned, ``retain`` if it works to a wanted number.

    Raises
    ------
    ValueError
        If it has neither.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {shown(method)}, expected one of {', '.join(calibrated_methods())}")
    if METHODS[method].thresholds:
        return "thresholds"
    if hasattr(METHODS[method], "retain"):
        return "retain"
    raise ValueError(f"method: {method} has nothing to turn, expected one of {', '.join(calibrated_methods())}")


def calibrated_methods() -> list[str]:
    """Names of the methods that have something to turn."""
    return sorted(name for name, method in METHODS.items() if method.thresholds or hasattr(method, "retain"))


def settings_at(method: str, target: int, scale: float) -> dict[str, Any]:
    """A method's thresholds at a scale, rounded as they are written; the higher the scale, the fewer tokens stay."""
    if kind_of_setting(method) == "retain":
        return {"retain": max(1, round(target / scale))}
    return {name: float(f"{value * scale:.4g}") for name, value in METHODS[method].thresholds.items()}


def search(
    measure: Callable[[float], Point],
    target: float,
    known: dict[float, Point],
    tolerance: float,
    scales: tuple[float, float] = RANGE["thresholds"],
) -> Point:
    """The scale whose ``tokens_official`` comes closest to a target, to within ``tolerance`` of it, by bisection.

    Parameters
    ----------
    measure : callable
        Scale -> ``Point``; the count falls as the scale rises, apart from small wiggles.
    target : float
        Wanted ``tokens_official``.
    known : dict
        Points measured already, by scale; gets the new ones.
    tolerance : float
        Relative.
    scales : (float, float)
        Lowest and highest scale; the search is even in their logarithm.

    Raises
    ------
    OutOfReach
        If the target lies below the count that is left when everything droppable is dropped, above the count when
        nothing is, or in a jump between two counts.
    """

    def at(scale: float) -> Point:
        if scale not in known:
            known[scale] = measure(scale)
        return known[scale]

    def error(point: Point) -> float:
        return abs(point.tokens_official - target) / target

    if scales[0] < 1 < scales[1] and error(at(1.0)) <= tolerance / 2:
        return at(1.0)
    low, high = at(scales[0]), at(scales[1])
    best = min(known.values(), key=error)
    if error(best) <= tolerance:
        return best
    if target < high.tokens_official:
        raise OutOfReach(
            f"{target:g} tokens is below the floor of {high.tokens_official:.1f}: layers before the first drop see "
            "every token, and protected tokens are never dropped; an earlier drop or fewer protected tokens lower it"
        )
    if target > low.tokens_official:
        raise OutOfReach(
            f"{target:g} tokens is above the {low.tokens_official:.1f} that are left before any threshold drops one; "
            "merging less in the vision encoder raises it"
        )
    for point in known.values():  # the tightest bracket that earlier searches leave
        if point.tokens_official >= target and point.scale > low.scale:
            low = point
    for point in known.values():
        if point.tokens_official < target and low.scale < point.scale < high.scale:
            high = point
    for _ in range(STEPS):
        middle = at(math.sqrt(low.scale * high.scale))
        if error(middle) < error(best):
            best = middle
        if error(best) <= tolerance / 2:
            break
        low, high = (middle, high) if middle.tokens_official >= target else (low, middle)
    if error(best) > tolerance:
        raise OutOfReach(f"{target:g} tokens lies in a jump; the closest is {best.tokens_official:.1f}")
    return best


if __name__ == "__main__":
    sys.exit("error: mustdrop.calibrate has no model to measure on, run: mustdrop calibrate")
