"""A recording read as a program: slots, loops, and which storage each event is about. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from memfit.specs.tape import Reference
from memfit.specs.trace import Event
from memfit.trace.loops import LEAST, Repeat, find_repeats
from memfit.trace.recording import Recording
from memfit.trace.unfold import MAKES

MARK = "mark"


class Place(NamedTuple):
    """Where in the program an item stands: its slot, and its round in which loop (-1, 0 outside)."""

    slot: int
    loop: int
    round: int


class Candidates(NamedTuple):
    """What a slot may be about in the first, the middle and the last rounds of its loop; outside loops all are one.

    A loop that hands something on frees what the round before made, in its first round what was there before it.
    """

    first: frozenset[Reference]
    middle: frozenset[Reference]
    last: frozenset[Reference]


NOTHING = Candidates(frozenset(), frozenset(), frozenset())


@dataclass
class Program:
    """`items` are one per slot, of the first round; `loops`: (first slot, behind the last slot, rounds)."""

    items: list[Event] = field(default_factory=list)
    candidates: list[Candidates] = field(default_factory=list)
    loops: list[tuple[int, int, int]] = field(default_factory=list)


def program_of(recording: Recording) -> Program:
    """The program of one recording. Loops whose middle rounds do not refer alike come apart."""
    items = items_of(recording)
    repeats = list(find_repeats(_labels(items)))
    while True:
        program, odd = _read(items, repeats)
        if not odd:
            return program
        repeats = [row for loop, row in enumerate(repeats) if loop not in odd]


def items_of(recording: Recording) -> list[Event]:
    """Events with the marks between them: a mark is about no storage, its part is the path and its block the op."""
    items: list[Event] = []
    marks = iter([*recording.marks, (-1, ("", None))])
    at, where = next(marks)
    for index, event in enumerate(recording.events):
        while at == index:
            items.append(Event(MARK, -1, 0, "", where[0], "" if where[1] is None else str(where[1])))
            at, where = next(marks)
        items.append(event)
    return items


def _labels(items: Sequence[Event]) -> list[tuple[object, ...]]:
    """What makes two rounds of a loop equal: all but the numbers of storages, of which their making counts."""
    made = {item.storage: (item.phase, item.path, item.op, item.bytes) for item in items if item.kind in MAKES}
    return [(item.kind, item.bytes, item.phase, item.path, item.op, made.get(item.storage)) for item in items]


def _read(items: Sequence[Event], repeats: Sequence[Repeat]) -> tuple[Program, set[int]]:
    """The program, and the loops with a slot that no rule serves."""
    program, places = Program(), _places(items, repeats)
    owners: dict[int, Place] = {}
    about: dict[int, list[frozenset[Reference]]] = {}
    rounds = [row.rounds for row in repeats]
    for item, place in zip(items, places, strict=True):
        if place.slot == len(program.items):
            program.items.append(item)
        if item.kind in MAKES:
            owners[item.storage] = place
        elif item.storage >= 0:
            about.setdefault(place.slot, []).append(_ways(place, owners[item.storage], rounds))
    program.candidates = [_ends(about[slot]) if slot in about else NOTHING for slot in range(len(program.items))]
    loop_of = {place.slot: place.loop for place in places}
    odd = {loop_of[slot] for slot in about if not program.candidates[slot].middle}
    slots: dict[int, list[int]] = {}
    for slot, loop in loop_of.items():
        slots.setdefault(loop, []).append(slot)
    program.loops = [(min(slots[loop]), max(slots[loop]) + 1, rounds[loop]) for loop in range(len(repeats))]
    return program, odd


def _ends(sets: Sequence[frozenset[Reference]]) -> Candidates:
    if len(sets) < LEAST:
        return Candidates(sets[0], sets[0], sets[0])
    return Candidates(sets[0], frozenset.intersection(*sets[1:-1]), sets[-1])


def _places(items: Sequence[Event], repeats: Sequence[Repeat]) -> list[Place]:
    places: list[Place] = []
    slot = at = 0
    for loop, row in enumerate(repeats):
        places += [Place(slot + step, -1, 0) for step in range(row.first - at)]
        slot += row.first - at
        places += [Place(slot + step, loop, turn) for turn in range(row.rounds) for step in range(row.length)]
        slot += row.length
        at = row.last
    places += [Place(slot + step, -1, 0) for step in range(len(items) - at)]
    return places


def _ways(here: Place, owner: Place, rounds: Sequence[int]) -> frozenset[Reference]:
    if owner.loop < 0:
        return frozenset({Reference(owner.slot, "single", 0)})
    last = rounds[owner.loop] - 1
    found = {Reference(owner.slot, "first", owner.round), Reference(owner.slot, "last", owner.round - last)}
    if here.loop >= 0:
        found.add(Reference(owner.slot, "same", owner.round - here.round))
        found.add(Reference(owner.slot, "back", owner.round - (last - here.round)))
    return frozenset(found)
