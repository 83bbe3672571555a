"""Write the blocks that were left out into the events of a trace: copies of the middle period, storage by storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memfit.families.names import Where
from memfit.specs.trace import Event

KEPT = 3  # periods that run: the first, the middle one that stands for all others, the last
MAKES, ENDS = ("alloc", "host"), ("free", "host-free")  # kinds of events: on the device, in host memory


@dataclass(frozen=True)
class Run:
    """Equal periods of blocks in one part: `count` periods of `length` blocks from `start`, all but KEPT left out."""

    part: str
    start: int
    length: int
    count: int

    @property
    def skipped(self) -> tuple[int, ...]:
        """Indices of the blocks that do not run: between the second period and the last."""
        return tuple(range(self.start + 2 * self.length, self.start + (self.count - 1) * self.length))

    def place(self, block: int) -> int | None:
        """0, 1 or 2 for a block of the first, the middle and the last period; None outside."""
        period = (block - self.start) // self.length
        return {0: 0, 1: 1, self.count - 1: 2}.get(period) if period >= 0 else None


@dataclass
class _Segment:
    """The events of one period in forward or backward: indices [first, last)."""

    run: int
    place: int
    backward: bool
    first: int
    last: int
    owned: list[int] = field(default_factory=list)  # storages made here, in order


Owner = tuple[int, int, bool, int]  # run, place, backward, ordinal


def unfold(
    events: Sequence[Event], marks: Sequence[tuple[int, Where]], runs: Sequence[Run], prefixes: Mapping[str, str]
) -> list[Event] | None:
    """The events with the blocks left out written in; None where the kept periods are not alike.

    `marks`: (index of an event, the block whose operators run from there on). `prefixes`: part -> how paths of its
    blocks begin, up to the number.
    """
    segments = _segments(events, marks, runs)
    if segments is None:
        return None
    owners: dict[int, Owner] = {}
    for segment in segments:
        for event in events[segment.first : segment.last]:
            if event.kind in MAKES:
                owners[event.storage] = (segment.run, segment.place, segment.backward, len(segment.owned))
                segment.owned.append(event.storage)
    if not _alike(events, segments) or not _end_alike(events, segments, owners):
        return None
    tape = _Unfolding(events, runs, segments, owners, prefixes).write()
    return tape if tape is not None and _balanced(tape) else None


def _segments(
    events: Sequence[Event], marks: Sequence[tuple[int, Where]], runs: Sequence[Run]
) -> list[_Segment] | None:
    """One segment for each kept period and direction, in the order of the events; None if one is torn apart."""
    backward_from = next(i for i, event in enumerate(events) if event.kind == "phase" and event.phase == "backward")
    found: list[_Segment] = []
    ends = [index for index, _ in marks[1:]] + [len(events)]
    for (first, (part, block)), last in zip(marks, ends, strict=True):
        for number, run in enumerate(runs):
            place = run.place(block) if block is not None and run.part == part else None
            if place is None:
                continue
            backward = first >= backward_from
            last = last if backward else min(last, backward_from)
            old = found[-1] if found else None
            if old and (old.run, old.place, old.backward, old.last) == (number, place, backward, first):
                old.last = last
            else:
                found.append(_Segment(number, place, backward, first, last))
    keys = [(segment.run, segment.place, segment.backward) for segment in found]
    complete = all((number, place, False) in keys for number in range(len(runs)) for place in range(KEPT))
    return found if complete and len(set(keys)) == len(keys) else None


def _alike(events: Sequence[Event], segments: Sequence[_Segment]) -> bool:
    """Whether the middle period makes what its neighbours make, as far as copies of it will refer to them.

    The first period's backward may differ: nothing that runs before it can refer to it.
    """
    made: dict[tuple[int, int, bool], list[tuple[int, str]]] = {}
    for segment in segments:
        made[(segment.run, segment.place, segment.backward)] = [
            (event.bytes, event.op) for event in events[segment.first : segment.last] if event.kind in MAKES
        ]
    for (run, place, backward), sizes in made.items():
        if (place != 0 or not backward) and sizes != made.get((run, 1, backward), []):
            return False
    return True


def _end_alike(events: Sequence[Event], segments: Sequence[_Segment], owners: dict[int, Owner]) -> bool:
    """Whether what the first and the middle period leave to code outside the blocks is freed there in the same place.

    A model that takes an inner layer's result, as LLaVA does, keeps one for longer than the others.
    """
    bounds = sorted((segment.first, segment.last) for segment in segments)
    outside: dict[Owner, int] = {}
    gap = 0
    for index, event in enumerate(events):
        while gap < len(bounds) and bounds[gap][1] <= index:
            gap += 1
        inside = gap < len(bounds) and bounds[gap][0] <= index
        owner = owners.get(event.storage)
        if event.kind in ENDS and owner is not None and owner[1] < 2 and not owner[2] and not inside:
            outside[owner] = gap
    return all(outside.get((run, 1 - place, False, number)) == gap for (run, place, _, number), gap in outside.items())


def _balanced(tape: Sequence[Event]) -> bool:
    """Whether everything is freed at most once, and only after it was made."""
    alive: set[int] = set()
    for event in tape:
        if event.kind in MAKES:
            if event.storage in alive:
                return False
            alive.add(event.storage)
        elif event.kind in (*ENDS, "gradient") and event.storage not in alive:
            return False
        elif event.kind in ENDS:
            alive.remove(event.storage)
    return True


class _Unfolding:
    """Writes the long tape. Storages are named by (run, period, direction, ordinal), or by their old number."""

    def __init__(
        self,
        events: Sequence[Event],
        runs: Sequence[Run],
        segments: Sequence[_Segment],
        owners: dict[int, Owner],
        prefixes: Mapping[str, str],
    ) -> None:
        self.events, self.runs, self.segments, self.owners, self.prefixes = events, runs, segments, owners, prefixes
        self.tape: list[Event] = []
        self.numbers: dict[Any, int] = {}

    def write(self) -> list[Event] | None:
        """None when a copy would free what is not a block's."""
        at = 0
        for segment in self.segments:
            for event in self.events[at : segment.first]:
                self._fixed(event)
            run = self.runs[segment.run]
            last = run.count - 1
            copies = range(2, last) if not segment.backward else range(last - 1, 1, -1)
            # Forward, copies follow the middle period; in backward they run before it.
            if segment.place == 1 and segment.backward and not self._copies(segment, copies):
                return None
            if not self._period(segment, {0: 0, 1: 1, 2: last}[segment.place], copy=False):
                return None
            if segment.place == 1 and not segment.backward and not self._copies(segment, copies):
                return None
            at = segment.last
        for event in self.events[at:]:
            self._fixed(event)
        return self.tape

    def _copies(self, segment: _Segment, periods: Sequence[int]) -> bool:
        return all(self._period(segment, period, copy=True) for period in periods)

    def _period(self, segment: _Segment, period: int, copy: bool) -> bool:
        """The events of one period, or a copy of them for another."""
        moved: dict[str, str] = {}
        for event in self.events[segment.first : segment.last]:
            owner = self.owners.get(event.storage)
            if owner is None or owner[0] != segment.run:
                if not copy:
                    self._fixed(event)
                elif event.kind in ENDS:
                    return False
                continue
            distance = owner[1] - segment.place
            if abs(distance) > 1:
                return False
            path = moved.get(event.path)
            if path is None:
                path = moved[event.path] = self._moved(event.path, segment, period)
            self._put(event, (owner[0], period + distance, owner[2], owner[3]), path)
        return True

    def _fixed(self, event: Event) -> None:
        """An event outside the run. What it does to the middle period it does to all its copies."""
        owner = self.owners.get(event.storage)
        if owner is None:
            self._put(event, event.storage, event.path)
            return
        last = self.runs[owner[0]].count - 1
        for period in {0: (0,), 1: range(1, last), 2: (last,)}[owner[1]]:
            self._put(event, (owner[0], period, owner[2], owner[3]), event.path)

    def _put(self, event: Event, name: Any, path: str) -> None:
        number = -1 if event.storage < 0 else self.numbers.setdefault(name, len(self.numbers) + 1)
        self.tape.append(Event(event.kind, number, event.bytes, event.phase, path, event.op))

    def _moved(self, path: str, segment: _Segment, period: int) -> str:
        """The path with the block number of the period that is written."""
        run = self.runs[segment.run]
        old = {0: 0, 1: 1, 2: run.count - 1}[segment.place]
        return moved_path(path, self.prefixes[run.part], (period - old) * run.length)


def moved_path(path: str, prefix: str, by: int) -> str:
    """`path` with its block number, which stands behind `prefix`, raised by `by`."""
    at = path.find(prefix)
    if at < 0 or not by:
        return path
    number, dot, rest = path[at + len(prefix) :].partition(".")
    return f"{path[: at + len(prefix)]}{int(number) + by}{dot}{rest}" if number.isdigit() else path
