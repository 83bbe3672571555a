"""Exact functions of a micro-batch's rows and tokens: sums of at most three monomials with rational coefficients.

A tensor's bytes grow with its sides, and its sides are rows, tokens, tokens rounded up to what a kernel works in (8 to
128; chunks of 64 in linear attention, of 512 positions in a chunked loss), or fixed. So one or two monomials say it.
What they do not say to the byte gets no function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from itertools import combinations

import numpy as np

from memfit.specs.tape import SizeFunction, SizeTerm

ROUNDINGS = (8, 16, 32, 64, 128)
CHUNK = 512  # positions of a chunked loss
LARGEST_DENOMINATOR = 512


def _names() -> tuple[str, ...]:
    """All monomials, simplest first: rows^a x length x length, where a length may be rounded or one short."""
    lengths = ("T", *(f"T{step}" for step in ROUNDINGS), "T-1")
    single = ("1", *lengths)
    pairs = tuple(f"{a}*{b}" for a in lengths for b in lengths if lengths.index(a) <= lengths.index(b))
    found = [name for name in (*single, *pairs) for name in (name, f"B*{name}")]
    return (*found, "BT512", "BT-1_512")


MONOMIALS = _names()


def values_of(rows: int, tokens: int) -> dict[str, int]:
    """Every monomial at `rows` rows of `tokens` tokens."""
    lengths = {"1": 1, "T": tokens, "T-1": tokens - 1}
    lengths |= {f"T{step}": -(-tokens // step) * step for step in ROUNDINGS}
    found = {"BT512": -(-rows * tokens // CHUNK), "BT-1_512": -(-rows * (tokens - 1) // CHUNK)}
    for name in MONOMIALS:
        if name not in found:
            size = rows if name.startswith("B*") else 1
            for side in name.removeprefix("B*").split("*"):
                size *= lengths[side]
            found[name] = size
    return found


def fit(points: Sequence[Mapping[str, int]], sizes: Sequence[int]) -> SizeFunction | None:
    """The simplest function that gives every size to the byte; None where three monomials do not.

    `points` are `values_of` each size's rows and tokens. Points that stay out of the search must be checked by the
    caller: with few points a wrong function may pass.
    """
    if not any(sizes):
        return ()
    table = np.array([[point[name] for name in MONOMIALS] for point in points], dtype=np.float64)
    wanted = np.array(sizes, dtype=np.float64)
    for count in (1, 2, 3):
        for columns in _close(table, wanted, count):
            found = _exact(points, sizes, [MONOMIALS[column] for column in columns])
            if found is not None:
                return found
    return None


def evaluate(function: SizeFunction, point: Mapping[str, int]) -> int:
    """The size at a point. Raises ValueError where it is not a whole number: there the function does not hold."""
    size = sum((Fraction(term.numerator * point[term.monomial], term.denominator) for term in function), Fraction(0))
    if size.denominator != 1 or size < 0:
        raise ValueError(f"{function} gives {size}")
    return int(size)


def _close(table: np.ndarray, wanted: np.ndarray, count: int) -> list[tuple[int, ...]]:
    """Sets of `count` columns that reach `wanted` within rounding, simplest first."""
    sets = _sets(table.shape[1], count)
    if len(wanted) <= count:
        return []
    scaled = table / np.abs(table).max(axis=0)
    sides = scaled[:, sets].transpose(1, 0, 2)  # [sets, points, count]
    normal = sides.transpose(0, 2, 1) @ sides
    good = np.linalg.cond(normal) < 1e13
    sets, sides, normal = sets[good], sides[good], normal[good]
    target = wanted / np.abs(wanted).max()
    solved = np.linalg.solve(normal, (sides.transpose(0, 2, 1) @ target)[..., None])
    errors = np.abs((sides @ solved)[..., 0] - target).max(axis=1)
    return [tuple(row) for row in sets[errors < 1e-6]]


@cache
def _sets(width: int, count: int) -> np.ndarray:
    """All sets of `count` columns of `width`, the first columns first."""
    return np.array(list(combinations(range(width), count)))


def _exact(points: Sequence[Mapping[str, int]], sizes: Sequence[int], names: Sequence[str]) -> SizeFunction | None:
    rows = [
        [Fraction(point[name]) for name in names] + [Fraction(size)] for point, size in zip(points, sizes, strict=True)
    ]
    solved = _solve(rows, len(names))
    if solved is None or any(value == 0 or value.denominator > LARGEST_DENOMINATOR for value in solved):
        return None
    if any(sum(a * x for a, x in zip(row, solved, strict=False)) != row[-1] for row in rows):
        return None
    return tuple(SizeTerm(value.numerator, value.denominator, name) for value, name in zip(solved, names, strict=True))


def _solve(rows: Sequence[Sequence[Fraction]], count: int) -> list[Fraction] | None:
    """The solution of `count` independent rows; None where there are not as many."""
    work = [list(row) for row in rows]
    for column in range(count):
        pivot = next((i for i in range(column, len(work)) if work[i][column]), None)
        if pivot is None:
            return None
        work[column], work[pivot] = work[pivot], work[column]
        head = work[column][column]
        work[column] = [value / head for value in work[column]]
        for i, row in enumerate(work):
            if i != column and row[column]:
                factor = row[column]
                work[i] = [a - factor * b for a, b in zip(row, work[column], strict=True)]
    return [work[i][-1] for i in range(count)]
