"""The course of memory over one traced step, thinned to a few hundred moments: enough to draw, small enough to keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from memfit.specs.trace import Event, Moment
from memfit.trace.stretches import kept_for_backward
from memfit.trace.summary import INPUT

WINDOWS = 160  # per traced step; of each window the highest and the lowest moment are kept


def thinned(events: Sequence[Event], windows: int = WINDOWS) -> tuple[Moment, ...]:
    """At most two moments a window, in order, each phase in at least two windows: no peak and no valley is lost."""
    moments = list(_moments(events))
    phases = list(dict.fromkeys(moment.phase for moment in moments))
    kept: list[Moment] = []
    for phase in phases:
        own = [moment for moment in moments if moment.phase == phase]
        count = min(len(own), max(2, round(windows * len(own) / len(moments))))
        for place in range(count):
            window = own[place * len(own) // count : (place + 1) * len(own) // count]
            ends = {max(window, key=lambda row: row.bytes), min(window, key=lambda row: row.bytes)}
            kept += sorted(ends, key=lambda row: row.at)
    return tuple(kept)


def _moments(events: Iterable[Event]) -> Iterator[Moment]:
    """What is alive after each event. What autograd keeps is what is alive when backward begins."""
    events = list(events)
    saved = kept_for_backward(events)
    now = dict.fromkeys(("inputs", "saved", "transient", "gradients"), 0)
    alive: dict[int, tuple[int, str]] = {}
    for at, event in enumerate(events):
        if event.kind == "alloc":
            role = "inputs" if event.op == INPUT else "saved" if event.storage in saved else "transient"
            alive[event.storage] = (event.bytes, role)
            now[role] += event.bytes
        elif event.kind == "free":
            size, role = alive.pop(event.storage)
            now[role] -= size
        elif event.kind == "gradient":
            size, role = alive[event.storage]
            now[role] -= size
            now["gradients"] += size
            alive[event.storage] = (size, "gradients")
        yield Moment(at, event.phase, **now)
