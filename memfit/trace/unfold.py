"""Write the blocks that were left out into the events of a trace: copies of those that stand for them, storage by
storage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Any

from memfit.families.names import Where
from memfit.specs.trace import Event
from memfit.trace.folds import Fold

MAKES, ENDS = ("alloc", "host"), ("free", "host-free")  # kinds of events: on the device, in host memory


@dataclass
class _Segment:
    """The events of one block in forward or backward: indices [first, last)."""

    fold: int
    block: int
    backward: bool
    first: int
    last: int
    owned: list[int] = field(default_factory=list)  # storages made here, in order

    @property
    def key(self) -> _Key:
        return self.fold, self.block, self.backward


_Key = tuple[int, int, bool]  # fold, block, backward
Owner = tuple[int, int, bool, int]  # the same, and which of the storages made there


def unfold(
    events: Sequence[Event], marks: Sequence[tuple[int, Where]], folds: Sequence[Fold], prefixes: Mapping[str, str]
) -> list[Event] | None:
    """The events with the blocks left out written in; None where blocks of one kind turn out not to be alike.

    `marks`: (index of an event, the block whose operators run from there on). `prefixes`: part -> how paths of its
    blocks begin, up to the number.
    """
    segments = _segments(events, marks, folds)
    if segments is None:
        return None
    owners: dict[int, Owner] = {}
    for segment in segments:
        for event in events[segment.first : segment.last]:
            if event.kind in MAKES:
                owners[event.storage] = (*segment.key, len(segment.owned))
                segment.owned.append(event.storage)
    if not _alike(events, segments, folds) or not _end_alike(events, segments, folds, owners):
        return None
    if not _nothing_between(events, segments, folds):
        return None
    tape = _Unfolding(events, folds, segments, owners, prefixes).write()
    return tape if tape is not None and _balanced(tape) else None


def _segments(
    events: Sequence[Event], marks: Sequence[tuple[int, Where]], folds: Sequence[Fold]
) -> list[_Segment] | None:
    """One segment for each block that ran and direction, in the order of the events; None if one is torn apart."""
    backward_from = next(i for i, event in enumerate(events) if event.kind == "phase" and event.phase == "backward")
    numbers = {(fold.part, block): number for number, fold in enumerate(folds) for block in fold.kept}
    found: list[_Segment] = []
    ends = [index for index, _ in marks[1:]] + [len(events)]
    for (first, (part, block)), last in zip(marks, ends, strict=True):
        number = numbers.get((part, -1 if block is None else block))
        if number is None or block is None:
            continue
        backward = first >= backward_from
        last = last if backward else min(last, backward_from)
        if found and found[-1].key == (number, block, backward) and found[-1].last == first:
            found[-1].last = last
        else:
            found.append(_Segment(number, block, backward, first, last))
    keys = {segment.key for segment in found}
    complete = all((number, block, False) in keys for number, fold in enumerate(folds) for block in fold.kept)
    return found if complete and len(keys) == len(found) else None


def _alike(events: Sequence[Event], segments: Sequence[_Segment], folds: Sequence[Fold]) -> bool:
    """Whether blocks of one kind make the same, as far as copies of them will refer to them.

    The first of a kind may differ in backward where it stands for itself alone: what comes before it may need no
    gradient, and nothing that runs before its backward can refer to it.
    """
    made: dict[_Key, list[tuple[int, str]]] = {}
    for segment in segments:
        made[segment.key] = [
            (event.bytes, event.op) for event in events[segment.first : segment.last] if event.kind in MAKES
        ]
    for number, fold in enumerate(folds):
        for stand in _standing(fold):
            like = [block for block in fold.kept if fold.kinds[block] == fold.kinds[stand]]
            for block in like:
                exempt = block == like[0] and fold.count(block) == 1
                for backward in (False,) if exempt else (False, True):
                    if made.get((number, block, backward), []) != made.get((number, stand, backward), []):
                        return False
    return True


def _end_alike(
    events: Sequence[Event], segments: Sequence[_Segment], folds: Sequence[Fold], owners: Mapping[int, Owner]
) -> bool:
    """Whether what a block that stands for others leaves to code outside the blocks is freed there where others of its
    kind have it freed. One with something else behind it may leave more: its result. Where no other has the like behind
    it, blocks of all kinds must leave something at the same moments, or it nothing.

    A model that takes an inner layer's result, as LLaVA does, keeps one for longer than the others.
    """
    bounds = sorted((segment.first, segment.last) for segment in segments)
    left: dict[tuple[int, int], dict[int, int]] = {}  # fold, block -> which of its storages -> behind which segment
    gap = 0
    for index, event in enumerate(events):
        while gap < len(bounds) and bounds[gap][1] <= index:
            gap += 1
        inside = gap < len(bounds) and bounds[gap][0] <= index
        owner = owners.get(event.storage)
        if event.kind in ENDS and owner is not None and not owner[2] and not inside:
            left.setdefault(owner[:2], {})[owner[3]] = gap
    for number, fold in enumerate(folds):
        for stand in _standing(fold):
            own, behind = left.get((number, stand), {}), [*fold.kinds[1:], -1]
            others = [at for at in fold.kept if at != stand and fold.kinds[at] == fold.kinds[stand]]
            same = [left.get((number, at), {}) for at in others if behind[at] == behind[stand]]
            more = [left.get((number, at), {}) for at in others if behind[at] != behind[stand]]
            if any(one != own for one in same) or any(not own.items() <= one.items() for one in more):
                return False
            moments = [set(left.get((number, at), {}).values()) for at in fold.kept[:-1]]
            if own and not same and any(one != set(own.values()) for one in moments):
                return False
    return True


def _nothing_between(events: Sequence[Event], segments: Sequence[_Segment], folds: Sequence[Fold]) -> bool:
    """Whether nothing is made between two blocks where others were left out: there it would be missing."""
    for one, other in pairwise(segments):
        if (one.fold, one.backward) != (other.fold, other.backward) or abs(one.block - other.block) == 1:
            continue
        if any(event.kind in MAKES for event in events[one.last : other.first]):
            return False
    return True


def _standing(fold: Fold) -> Iterable[int]:
    """Blocks that stand for others too."""
    return (block for block in fold.kept if fold.count(block) > 1)


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
    """Writes the long tape. Storages are named by (fold, block, direction, ordinal), or by their old number."""

    def __init__(
        self,
        events: Sequence[Event],
        folds: Sequence[Fold],
        segments: Sequence[_Segment],
        owners: Mapping[int, Owner],
        prefixes: Mapping[str, str],
    ) -> None:
        self.events, self.folds, self.segments, self.owners, self.prefixes = events, folds, segments, owners, prefixes
        self.tape: list[Event] = []
        self.numbers: dict[Any, int] = {}
        self.at = {segment.key: segment for segment in segments}
        forward = takewhile(lambda event: (event.kind, event.phase) != ("phase", "backward"), events)
        # What is made in forward outside the blocks.
        self.given = {event.storage for event in forward if event.kind in MAKES and event.storage not in owners}
        # Gradients of an earlier micro-batch, of every block's parameters: name -> storage.
        self.gradients: dict[str, int] = {}
        # How far from a block another stands among those that ran.
        self.places = [{block: place for place, block in enumerate(fold.kept)} for fold in folds]
        self.copies = [
            {kept: [at for at, other in enumerate(fold.stands) if other == kept] for kept in fold.kept}
            for fold in folds
        ]

    def write(self) -> list[Event] | None:
        """None when a copy would free what is not a block's, or a block frees what is not its neighbour's, or not every
        block has its place."""
        at, written = 0, 0
        for segment in self.segments:
            for event in self.events[at : segment.first]:
                self._fixed(event)
            # Forward, those left out follow the block behind which they are missing; in backward they run before it.
            missing = self._missing(segment)
            order = [*reversed(missing), segment.block] if segment.backward else [segment.block, *missing]
            if not all(self._block(segment, block) for block in order):
                return None
            at, written = segment.last, written + len(order)
        for event in self.events[at:]:
            self._fixed(event)
        return self.tape if written == sum(len(self.copies[one.fold][one.block]) for one in self.segments) else None

    def _missing(self, segment: _Segment) -> list[int]:
        """The blocks left out between this one and the next that ran."""
        kept = self.folds[segment.fold].kept
        place = self.places[segment.fold][segment.block]
        return list(range(segment.block + 1, kept[place + 1])) if place + 1 < len(kept) else []

    def _block(self, beside: _Segment, block: int) -> bool:
        """The events of one block: its own, or a copy of those of the block that stands for it."""
        stand = self.folds[beside.fold].stands[block]
        segment = self.at.get((beside.fold, stand, beside.backward))
        if segment is None:
            return False
        places, copy = self.places[segment.fold], block != stand
        moved: dict[str, str] = {}
        for event in self.events[segment.first : segment.last]:
            path = moved.get(event.path)
            if path is None:
                prefix = self.prefixes[self.folds[segment.fold].part]
                path = moved[event.path] = moved_path(event.path, prefix, block - stand)
            owner = self.owners.get(event.storage)
            if owner is None or owner[0] != segment.fold:
                if not copy:
                    self._fixed(event)
                elif event.kind == "gradient" and path in self.gradients:
                    self._put(event, self.gradients[path], path)
                elif event.kind == "gradient" or (event.kind in ENDS and not self._shared(event, segment)):
                    return False
                continue
            distance = places[owner[1]] - places[stand]
            if abs(distance) > 1:
                return False
            self._put(event, (owner[0], block + distance, owner[2], owner[3]), path)
        return True

    def _shared(self, event: Event, segment: _Segment) -> bool:
        """Whether a block frees what blocks of its kind were all given in forward, as the last of them in backward.

        Another of its kind that runs before it then frees nothing of forward but what blocks made.
        """
        fold = self.folds[segment.fold]
        if not segment.backward or event.storage not in self.given:
            return False
        later = [at for at in fold.kept if at > segment.block and fold.kinds[at] == fold.kinds[segment.block]]
        others = [self.at[(segment.fold, block, True)] for block in later]
        freed = {event.storage for one in others for event in self.events[one.first : one.last] if event.kind in ENDS}
        return bool(others) and not freed & self.given

    def _fixed(self, event: Event) -> None:
        """An event outside the blocks. What it does to a block it does to all that the block stands for."""
        owner = self.owners.get(event.storage)
        if owner is None:
            self._put(event, event.storage, event.path)
            if event.kind == "gradient":
                self.gradients.setdefault(event.path, event.storage)
            return
        for block in self.copies[owner[0]][owner[1]]:
            self._put(event, (owner[0], block, owner[2], owner[3]), event.path)

    def _put(self, event: Event, name: Any, path: str) -> None:
        number = -1 if event.storage < 0 else self.numbers.setdefault(name, len(self.numbers) + 1)
        self.tape.append(Event(event.kind, number, event.bytes, event.phase, path, event.op))


def moved_path(path: str, prefix: str, by: int) -> str:
    """`path` with its block number, which stands behind `prefix`, raised by `by`."""
    at = path.find(prefix)
    if at < 0 or not by:
        return path
    number, dot, rest = path[at + len(prefix) :].partition(".")
    return f"{path[: at + len(prefix)]}{int(number) + by}{dot}{rest}" if number.isdigit() else path
