"""Trace equal blocks once: the first, one in the middle and the last run, the others are written into the events.

A deep model spends its trace on blocks that do the same. `plan_skips` looks at what every block is called with and
picks the repeats; `unfold` copies the events of the middle one for those left out, storage by storage. Where the kept
blocks turn out not to be alike, `unfold` says so and the caller traces the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memfit.specs.trace import Event

Where = tuple[str, int | None]
LONGEST_PERIOD = 8  # Qwen3.5 repeats after 4 blocks, Qwen2.5-VL's tower after 8
KEPT = 3  # periods that run: the first, the middle one that stands for all others, the last
MAKES, ENDS = ("alloc", "host"), ("free", "host-free")  # kinds of events: on the device, in host memory
SMALL = 4096  # numbers of a tensor that count as part of a block's call


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


@contextmanager
def left_out(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within, these blocks hand their hidden states through."""
    for block in blocks:
        block.forward = _through
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _through(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    return hidden_states


def blocks_of(model: nn.Module, locate: Callable[[str], Where]) -> dict[Where, nn.Module]:
    """The numbered blocks of every part: the outermost module with that number."""
    found: dict[Where, nn.Module] = {}
    for name, module in model.named_modules():
        where = locate(name)
        if where[1] is not None and where not in found:
            found[where] = module
    return found


def plan_skips(blocks: dict[Where, nn.Module], run_forward: Callable[[], Any]) -> tuple[Run, ...]:
    """Which blocks to leave out. `run_forward` runs the model's forward once, here with no block doing anything."""
    calls: dict[Where, Any] = {}
    handles = [
        block.register_forward_pre_hook(_noting(where, calls, block), with_kwargs=True)
        for where, block in blocks.items()
    ]
    try:
        with left_out(list(blocks.values())), torch.no_grad():
            run_forward()
    finally:
        for handle in handles:
            handle.remove()
    runs: list[Run] = []
    for part in dict.fromkeys(part for part, _ in blocks):
        count = sum(name == part for name, _ in blocks)
        runs += _runs(part, [calls.get((part, number), number) for number in range(count)])
    return tuple(runs)


def _noting(where: Where, calls: dict[Where, Any], block: nn.Module) -> Callable[..., None]:
    parameters = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters())
    kinds = tuple(type(module) for module in block.modules())
    on = getattr(block, "gradient_checkpointing", None)

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[where] = (parameters, kinds, on, _described(args), _described(tuple(sorted(kwargs.items()))))

    return note


def _described(value: Any) -> Any:
    """What matters of an argument: shapes, and the numbers of small integer tensors."""
    if isinstance(value, torch.Tensor):
        numbers: Any = ()
        if not isinstance(value, FakeTensor) and value.numel() <= SMALL:
            numbers = tuple(value.flatten().tolist())
        return tuple(value.shape), value.dtype, value.requires_grad, numbers
    if isinstance(value, tuple | list):
        return tuple(_described(item) for item in value)
    return value if isinstance(value, str | int | float | bool | None) else type(value)


def _runs(part: str, calls: list[Any]) -> list[Run]:
    """The periods that leave out most blocks; runs do not overlap."""
    best: list[Run] = []
    for length in range(1, LONGEST_PERIOD + 1):
        found, start = [], 0
        while start < len(calls):
            end = start + length
            while end < len(calls) and calls[end] == calls[end - length]:
                end += 1
            count = (end - start) // length
            if count > KEPT:
                found.append(Run(part, start, length, count))
                start += count * length
            else:
                start += 1
        if sum(len(run.skipped) for run in found) > sum(len(run.skipped) for run in best):
            best = found
    return best


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
            name = (owner[0], period + distance, owner[2], owner[3])
            self._put(event, name, self._moved(event.path, segment, period))
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
        self.tape.append(event._replace(storage=number, path=path))

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
