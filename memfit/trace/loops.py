"""Find the loops in a recording: stretches of events that come again and again, the same sizes each time.

Only a proposal: whether a program with these loops is right is decided by playing it where it was not made.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

LEAST = 3  # rounds that make a loop
LONGEST = 4096  # events of one round


class Repeat(NamedTuple):
    """`rounds` rounds of `length` items from item `first` on."""

    first: int
    length: int
    rounds: int

    @property
    def last(self) -> int:
        """The item behind the last round."""
        return self.first + self.length * self.rounds


def find_repeats(items: Sequence[Hashable]) -> tuple[Repeat, ...]:
    """Repeats that do not overlap, in order: what covers most goes first, of those the shortest round."""
    numbers: dict[Hashable, int] = {}
    values = np.array([numbers.setdefault(item, len(numbers)) for item in items], dtype=np.int32)
    found: list[Repeat] = []
    for length in range(1, min(LONGEST, len(values) // LEAST) + 1):
        found += _of_length(values, length)
    found.sort(key=lambda row: (-row.length * row.rounds, row.length, row.first))
    taken = np.zeros(len(values), dtype=bool)
    chosen = []
    for row in found:
        if not taken[row.first : row.last].any():
            taken[row.first : row.last] = True
            chosen.append(row)
    return tuple(sorted(chosen))


def _of_length(values: np.ndarray, length: int) -> list[Repeat]:
    differ = np.flatnonzero(values[:-length] != values[length:])
    edges = np.concatenate(([-1], differ, [len(values) - length]))
    equal = np.diff(edges) - 1
    return [
        Repeat(int(edges[at]) + 1, length, int(equal[at] + length) // length)
        for at in np.flatnonzero(equal >= (LEAST - 1) * length)
    ]
