"""The largest value that fits, found by narrowing a bracket: more never fits where less does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

GAIN = 4  # times the lower end: further than that a first guess is not trusted


@dataclass(frozen=True)
class Grid:
    """Values from `low` to `high`, both among them; in between multiples of `unit`. The answer may be `share` short."""

    low: int
    high: int
    unit: int = 1
    share: float = 0.0

    def inside(self, value: float, below: int, above: int) -> int | None:
        """The value of the grid nearest to one, strictly between two; None where there is none."""
        first, last = below // self.unit + 1, -(-above // self.unit) - 1
        return None if first > last else self.unit * min(last, max(first, round(value / self.unit)))


def largest(spare: Callable[[int], float], grid: Grid) -> int | None:
    """The largest value of the grid whose `spare` is not negative, None where that of `low` is.

    `spare` falls as the value grows: bytes that are left over, or any other measure; its size only guides the guesses,
    its sign decides. Where it is a plain yes and no (1 and -1) every guess halves what is left.
    """
    low, left = grid.low, spare(grid.low)
    if left < 0:
        return None
    if grid.high <= low:
        return low
    # Memory grows about in proportion, so that the highest value, far beyond, is looked at only if nothing refuses it.
    high, lacking = _upper(spare, grid)
    if high is None:
        return grid.high
    halve = False
    while True:
        middle = (low + high) / 2
        guess = low + (high - low) * left / (left - lacking) if not halve else middle
        between = grid.inside(guess, low, high)
        if between is None or high - low <= max(grid.unit, grid.share * low):
            return low
        found, before = spare(between), high - low
        if found >= 0:
            low, left = between, found
        else:
            high, lacking = between, found
        halve = high - low > before / 2  # a straight line led astray: take the middle once


def _upper(spare: Callable[[int], float], grid: Grid) -> tuple[int | None, float]:
    """A value that does not fit, and what it lacks; (None, 0) where all fit."""
    value = grid.low
    while value < grid.high:
        value = grid.inside(value * GAIN, value, grid.high) or grid.high
        found = spare(value)
        if found < 0:
            return value, found
    return None, 0.0
