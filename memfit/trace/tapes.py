"""The tapes of one step: which sizes are recorded for them, and which tape holds for a batch. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from memfit.specs.tape import WHOLE, Tape
from memfit.specs.trace import TraceBatch
from memfit.trace.recording import Recording
from memfit.trace.tape import Size, play, tape_of

Record = Callable[[int, int], Recording]  # rows, tokens -> what is recorded
# Where between the shortest (0) and the longest (1) length recordings are made, and what is left of the length over
# multiples of WHOLE; ODD is whatever comes, so that no two roundings agree at all of them.
ODD = -1
Places = tuple[tuple[float, int], ...]
SEEN: Places = ((0.13, ODD), (0.27, 0), (0.38, ODD), (0.55, ODD), (0.71, 0), (0.93, ODD))
HELD_OUT: Places = ((0.0, ODD), (0.31, 8), (0.47, 0), (0.82, 32), (1.0, ODD))
# Where the lengths are WIDE apart most are short, since long ones take longer to record: one that stays out of the
# search holds the tape against the longest.
WIDE = 64 * WHOLE
WIDE_SEEN: Places = ((0.03, ODD), (0.07, 0), (0.12, ODD), (0.19, ODD), (0.29, 0), (0.45, ODD))
WIDE_HELD_OUT: Places = ((0.0, ODD), (0.09, 8), (0.16, 0), (0.36, 32), (1.0, ODD))
NARROWEST = 10 * WHOLE
# Rows of a recording, in turn. One row runs other operators than several, and two repeat too little to show a loop.
ROWS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (((1,), (1,)), ((3, 5, 4, 6), (2, 8, 3, 4)))
FEW_ROWS = (((2,), (2,)), ((3, 5, 4, 6), (7, 8, 3, 4)))  # where two rows do not follow from more


def make_tapes(record: Record, shortest: int, longest: int, several: bool = True) -> tuple[Tape, ...]:
    """Tapes between two lengths, for one row and, with `several`, up to 8; sizes that no tape gives are traced anew.

    A tape for lengths with and without padding is tried first, then one for each. Raises ValueError for lengths that
    are too close together to tell one form from another.
    """
    if longest - shortest < NARROWEST:
        raise ValueError(f"{shortest} to {longest} tokens: less than {NARROWEST} apart")
    at_places = (WIDE_SEEN, WIDE_HELD_OUT) if longest - shortest >= WIDE else (SEEN, HELD_OUT)
    known: dict[Size, Recording] = {}

    def recorded(size: Size) -> Recording:
        if size not in known:
            known[size] = record(*size)
        return known[size]

    def tape(rows: tuple[tuple[int, ...], tuple[int, ...]], padded: bool | None) -> Tape | None:
        seen, held_out = (
            [(each[at % len(each)], length) for at, length in enumerate(_lengths(places, shortest, longest, padded))]
            for places, each in zip(at_places, rows, strict=True)
        )
        return tape_of({size: recorded(size) for size in seen}, {size: recorded(size) for size in held_out}, padded)

    found: list[Tape] = []
    for rows in ROWS if several else ROWS[:1]:
        either = tape(rows, None)
        found += [either] if either else [one for one in (tape(rows, True), tape(rows, False)) if one]
    if several and all(one.domain.rows == (1, 1) for one in found):
        found += [one for rows in FEW_ROWS for padded in (True, False) if (one := tape(rows, padded))]
    return tuple(found)


def played(tapes: Sequence[Tape], batch: TraceBatch) -> Recording | None:
    """The recording of a batch of equal rows; None where no tape holds."""
    rows, tokens = len(batch.rows), batch.rows[0]
    if set(batch.rows) != {tokens} or len(set(batch.images)) > 1 or batch.trained:
        return None
    for tape in tapes:
        if tape.domain.holds(rows, tokens):
            try:
                return play(tape, rows, tokens)
            except (ValueError, IndexError):
                continue  # a size that is no whole number, a round that is not there: this size is traced
    return None


def _lengths(places: Sequence[tuple[float, int]], shortest: int, longest: int, padded: bool | None) -> Iterator[int]:
    """Lengths at these places; of lengths that need padding none, of those that do not all are multiples of WHOLE."""
    first, last = -(-shortest // WHOLE), longest // WHOLE
    for place, over in places:
        if padded is False or (over == 0 and padded is None):
            yield WHOLE * (first + round(place * (last - first)))
            continue
        length = shortest + round(place * (longest - shortest))
        if over > 0:
            length = length // WHOLE * WHOLE + over
        yield length if length % WHOLE else length + (1 if place < 1 else -1)
