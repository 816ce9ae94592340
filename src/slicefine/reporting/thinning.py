"""Long series made short enough to draw: what would fall onto the same pixel is left out, extremes are kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

Point = tuple[float, float]
Item = TypeVar("Item")
MOST = 400
"""Points of a line. It is drawn less than twice as many pixels wide."""
ROUGH = 60
"""Logged losses from which on their mean is drawn."""


def thin(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """At most `most` of `points`, by rising x: first and last, and of each stretch of equal length the least and the greatest y."""
    if len(points) <= most:
        return list(points)
    stretches = max(1, (most - 2) // 2)
    inner = points[1:-1]
    kept = [points[0]]
    for number in range(stretches):
        part = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        if part:
            kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return [*kept, points[-1]]


def neighbours(points: Sequence[Point]) -> int:
    """Over how many neighbours a logged loss is to be smoothed; 0: not at all."""
    return max(3, len(points) // 40) if len(points) >= ROUGH else 0


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of y over `window` neighbours, as many before as after; fewer at the ends."""
    half = window // 2
    if half < 1:
        return list(points)
    sums = [0.0, *accumulate(y for _, y in points)]
    found = []
    for at, (x, _) in enumerate(points):
        reach = min(half, at, len(points) - 1 - at)
        found.append((x, (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)))
    return found


def spaced(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of `items`, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]
