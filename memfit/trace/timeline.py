"""The course of memory over one traced step, thinned to a few hundred moments: enough to draw, small enough to keep."""

from __future__ import annotations

from collections.abc import Sequence

from memfit.specs.trace import Event, Moment
from memfit.trace.stretches import kept_for_backward
from memfit.trace.summary import INPUT

WINDOWS = 160  # per traced step; of each window the highest and the lowest moment are kept


def thinned(events: Sequence[Event], windows: int = WINDOWS) -> tuple[Moment, ...]:
    """At most two moments a window, in order, each phase in at least two windows: no peak and no valley is lost."""
    course = _course(events)
    by_phase: dict[str, list[int]] = {}
    for at, event in enumerate(events):
        by_phase.setdefault(event.phase, []).append(at)
    total = [sum(row) for row in course]
    kept: list[Moment] = []
    for phase, own in by_phase.items():
        count = min(len(own), max(2, round(windows * len(own) / len(events))))
        for place in range(count):
            window = own[place * len(own) // count : (place + 1) * len(own) // count]
            ends = {max(window, key=total.__getitem__), min(window, key=total.__getitem__)}
            kept += [Moment(at, phase, *course[at]) for at in sorted(ends)]
    return tuple(kept)


def _course(events: Sequence[Event]) -> list[tuple[int, int, int, int]]:
    """Bytes of inputs, saved, transient and gradients that are alive after each event.

    What autograd keeps is what is alive when backward begins.
    """
    kept = kept_for_backward(events)
    now = [0, 0, 0, 0]
    alive: dict[int, tuple[int, int]] = {}
    course = []
    for kind, storage, size, _, _, op in events:
        if kind == "alloc":
            role = 0 if op == INPUT else 1 if storage in kept else 2
            alive[storage] = (size, role)
            now[role] += size
        elif kind == "free":
            size, role = alive.pop(storage)
            now[role] -= size
        elif kind == "gradient":
            size, role = alive[storage]
            now[role] -= size
            now[3] += size
            alive[storage] = (size, 3)
        course.append((now[0], now[1], now[2], now[3]))
    return course
