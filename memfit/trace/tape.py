"""Make a tape of some recordings of one step at different rows and tokens, and play it. Needs no torch.

A tape is right where it was held against traces: `tape_of` plays it at recordings that no function has seen, and every
event must be equal, or there is no tape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memfit.physics.size_functions import evaluate, fit, values_of
from memfit.specs.tape import Domain, Loop, Reference, SizeFunction, Slot, Tape
from memfit.specs.trace import Event
from memfit.trace.folds import Fold
from memfit.trace.program import MARK, Candidates, Program, program_of
from memfit.trace.recording import Recording
from memfit.trace.unfold import MAKES

Size = tuple[int, int]  # rows, tokens
Recordings = Mapping[Size, Recording]
WAYS = ("single", "same", "back", "first", "last")  # simplest first
LEAST_HELD_OUT = 3
SHARED = ("device", "substitutions", "parameters", "folds")  # what no size changes


class _NoForm(Exception):
    """Something that the recordings do not share, or that no function gives."""


def tape_of(seen: Recordings, held_out: Recordings, padded: bool | None = None) -> Tape | None:
    """The tape of `seen`, held against `held_out`; None where it does not give both to the byte.

    `padded` is of its domain. Raises ValueError for too few or known recordings in `held_out`.
    """
    if len(held_out) < LEAST_HELD_OUT or held_out.keys() & seen.keys():
        raise ValueError(f"{LEAST_HELD_OUT} other recordings must stay out of the search")
    try:
        tape = _Maker(seen, tuple(held_out)).make(padded)
    except _NoForm:
        return None
    right = all(play(tape, *size) == recording for size, recording in {**seen, **held_out}.items())
    return tape if right else None


def play(tape: Tape, rows: int, tokens: int) -> Recording:
    """The recording at these sizes.

    Raises ValueError where a function gives no whole number, IndexError where a loop runs too few rounds for its tape.
    """
    point = values_of(rows, tokens)
    sizes = [evaluate(function, point) for function in tape.functions]
    player = _Player(tape, sizes)
    player.run()
    return Recording(
        device=tape.device,
        substitutions=tape.substitutions,
        parameters=tape.parameters,
        inputs=sizes[tape.inputs],
        events=tuple(player.events),
        marks=tuple(player.marks),
        folds=tuple(Fold(*fold) for fold in tape.folds),
        flops={(phase, path): sizes[number] for phase, path, number in tape.flops},
    )


class _Maker:
    """Lays programs over one another: what differs becomes a function."""

    def __init__(self, seen: Recordings, held_out: tuple[Size, ...]) -> None:
        self.sizes, self.recordings, self.held_out = tuple(seen), tuple(seen.values()), held_out
        self.points = [values_of(*size) for size in self.sizes]
        self.functions: dict[SizeFunction, int] = {}
        self.known: dict[tuple[int, ...], int] = {}

    def make(self, padded: bool | None) -> Tape:
        first = self.recordings[0]
        for other in self.recordings[1:]:
            differ = any(getattr(first, name) != getattr(other, name) for name in SHARED)
            if differ or list(first.flops) != list(other.flops):
                raise _NoForm
        programs = [program_of(recording) for recording in self.recordings]
        slots, loops = self._slots(programs), self._loops(programs)
        inputs = self._number([recording.inputs for recording in self.recordings])
        flops = [(*key, self._number([recording.flops[key] for recording in self.recordings])) for key in first.flops]
        sizes = (*self.sizes, *self.held_out)
        rows, tokens = zip(*sizes, strict=True)
        return Tape(
            domain=Domain((min(rows), max(rows)), (min(tokens), max(tokens)), padded),
            device=first.device,
            substitutions=first.substitutions,
            parameters=first.parameters,
            functions=tuple(self.functions),
            slots=slots,
            loops=loops,
            inputs=inputs,
            flops=tuple(flops),
            folds=tuple((fold.part, fold.kinds, fold.stands) for fold in first.folds),
            held_out=self.held_out,
        )

    def _slots(self, programs: Sequence[Program]) -> tuple[Slot, ...]:
        if len({len(program.items) for program in programs}) > 1:
            raise _NoForm
        slots = []
        for number in range(len(programs[0].items)):
            items = [program.items[number] for program in programs]
            if len({(item.kind, item.phase, item.path, item.op) for item in items}) > 1:
                raise _NoForm
            item, size = items[0], None
            about: tuple[Reference, ...] = ()
            if item.kind in MAKES:
                size = self._number([item.bytes for item in items])
            elif item.storage >= 0:
                about = _about([program.candidates[number] for program in programs])
            slots.append(Slot(item.kind, item.phase, item.path, item.op, size, about))
        return tuple(slots)

    def _loops(self, programs: Sequence[Program]) -> tuple[Loop, ...]:
        if len({tuple(loop[:2] for loop in program.loops) for program in programs}) > 1:
            raise _NoForm
        counts = zip(*([loop[2] for loop in program.loops] for program in programs), strict=True)
        bounds = [loop[:2] for loop in programs[0].loops]
        return tuple(Loop(*bound, self._number(list(rounds))) for bound, rounds in zip(bounds, counts, strict=True))

    def _number(self, sizes: Sequence[int]) -> int:
        """The number of the function that gives these sizes, one for each recording."""
        key = tuple(sizes)
        if key not in self.known:
            function = fit(self.points, key)
            if function is None:
                raise _NoForm
            self.known[key] = self.functions.setdefault(function, len(self.functions))
        return self.known[key]


def _about(candidates: Sequence[Candidates]) -> tuple[Reference, ...]:
    """One reference where it serves all rounds, else one for the first, the middle and the last."""
    sets = [frozenset.intersection(*part) for part in zip(*candidates, strict=True)]
    common = frozenset.intersection(*sets)
    return tuple(map(_simplest, [common] if common else sets))


def _simplest(found: frozenset[Reference]) -> Reference:
    if not found:
        raise _NoForm
    return min(found, key=lambda row: (WAYS.index(row.way), abs(row.by), row))


class _Player:
    """Writes the events of a tape whose functions are numbers now."""

    def __init__(self, tape: Tape, sizes: Sequence[int]) -> None:
        self.tape, self.sizes = tape, sizes
        self.events: list[Event] = []
        self.marks: list[tuple[int, tuple[str, int | None]]] = []
        self.made: dict[int, list[int]] = {}  # slot -> storages, one a round
        self.bytes: list[int] = [0]  # of every storage; they are numbered from 1

    def run(self) -> None:
        at = 0
        for loop in self.tape.loops:
            self._slots(at, loop.first, 0, 1)
            rounds = self.sizes[loop.rounds]
            for turn in range(rounds):
                self._slots(loop.first, loop.last, turn, rounds)
            at = loop.last
        self._slots(at, len(self.tape.slots), 0, 1)

    def _slots(self, first: int, last: int, turn: int, rounds: int) -> None:
        end = 0 if turn == 0 else -1 if turn == rounds - 1 else 1
        for number in range(first, last):
            slot = self.tape.slots[number]
            if slot.size is not None:
                storage = len(self.bytes)
                self.bytes.append(self.sizes[slot.size])
                self.made.setdefault(number, []).append(storage)
                self.events.append(Event(slot.kind, storage, self.bytes[-1], slot.phase, slot.path, slot.op))
            elif slot.about:
                storage = self._storage(slot.about[0 if len(slot.about) == 1 else end], turn)
                size = 0 if slot.kind == "gradient" else self.bytes[storage]
                self.events.append(Event(slot.kind, storage, size, slot.phase, slot.path, slot.op))
            elif slot.kind == MARK:
                self.marks.append((len(self.events), (slot.path, int(slot.op) if slot.op else None)))
            else:
                self.events.append(Event(slot.kind, -1, 0, slot.phase, slot.path, slot.op))

    def _storage(self, about: Reference, turn: int) -> int:
        rounds = self.made[about.slot]
        last = len(rounds) - 1
        places = {"single": 0, "same": turn, "back": last - turn, "first": 0, "last": last}
        place = places[about.way] + about.by
        if place < 0:
            raise IndexError(f"round {place} of slot {about.slot}")
        return rounds[place]
