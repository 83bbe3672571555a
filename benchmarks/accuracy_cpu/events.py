"""What was seen of the CPU allocator, read as the course of one training step.

This shares nothing with memfit's tracker: torch.profiler reports every allocation and free with its address and size
(c10's memory reporting), and addresses are given meaning by looking at live tensors between the phases. On two ranks
recorder.py stands in for the profiler, which sees one thread only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "memfit:"
PHASES = ("forward", "loss", "backward", "step")
# What a byte is while the step runs. "engine": alive between the steps and none of the others.
ROLES = ("weights", "master", "optimizer", "gradients", "buffers", "batch", "engine", "saved", "transient")


class Memory(NamedTuple):
    """An allocation (size above 0) or a free of `address`."""

    time: int
    address: int
    size: int


class Marked(NamedTuple):
    """A span of the harness's own: a phase, a snapshot's moment, or a gradient's arrival."""

    start: int
    end: int
    name: str


@dataclass(frozen=True)
class Snapshot:
    """The storages of live tensors at one moment: address -> (role, bytes)."""

    roles: Mapping[int, tuple[str, int]]


@dataclass
class Phase:
    """The largest sum of a phase, what it was made of, and the most engine and transient bytes at any moment of it."""

    bytes: int = 0
    engine: int = 0
    of: dict[str, int] = field(default_factory=dict)
    transient: int = 0


@dataclass(frozen=True)
class Course:
    """One measured step, in bytes.

    `before`: by role, between the steps. `saved`: alive when backward begins, of what this step made and not gathered.
    `gradients`: the largest sum of arrived gradients. `kept`: alive at the end of backward, made by this step, and no
    gradient. `unseen`: states and inputs from before the profiler looked. `silent`: addresses given out again without a
    reported free, so freed by a thread that the profiler does not see.
    """

    before: dict[str, int]
    saved: int
    gradients: int
    kept: int
    phases: dict[str, Phase]
    unseen: int
    silent: int


class Watch(Protocol):
    """Sees every allocation while it is entered; `mark` names spans on its own clock."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> None: ...
    def mark(self, name: str) -> AbstractContextManager[Any]: ...
    def read(self) -> tuple[list[Memory], list[Marked]]: ...


class Profiler:
    """torch.profiler's memory records: one process, whose steps allocate in one thread."""

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> Profiler:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)

    def mark(self, name: str) -> AbstractContextManager[Any]:
        """A span with a name."""
        return record_function(MARK + name)

    def read(self) -> tuple[list[Memory], list[Marked]]:
        """All allocations and frees, and all marks, in the order of time."""
        memory: list[Memory] = []
        marks: list[Marked] = []
        waiting = list(self._profile.profiler.kineto_results.experimental_event_tree())
        while waiting:
            event = waiting.pop()
            waiting.extend(event.children)
            if event.tag == torch._C._profiler._EventType.Allocation:
                fields = event.extra_fields
                memory.append(Memory(event.start_time_ns, fields.ptr, fields.alloc_size))
            elif event.name.startswith(MARK):
                marks.append(Marked(event.start_time_ns, event.end_time_ns, event.name.removeprefix(MARK)))
        return sorted(memory, key=lambda event: event.time), sorted(marks)


@dataclass(frozen=True)
class Known:
    """What addresses mean: states `before`, parameters `gathered` when backward begins, `gradients` at its end.

    `bucket`: bytes of the engine's reduce bucket, which is told by its size, 0 for none.
    """

    before: Snapshot
    gathered: Snapshot
    gradients: Snapshot
    bucket: int = 0


def read_course(memory: Sequence[Memory], marks: Sequence[Marked], known: Known) -> Course:
    """The step between the marks "forward" and "step" that follow the last "before" mark."""
    before, gradients = known.before, known.gradients
    begins = next(mark for mark in reversed(marks) if mark.name == "before").start
    phases = {mark.name: mark for mark in marks if mark.name in PHASES and mark.start > begins}
    base, silent = _alive(event for event in memory if event.time < begins)
    roles = {address: before.roles.get(address, ("engine", 0))[0] for address in base}
    unseen = {address: size for address, (_, size) in before.roles.items() if address not in base}
    start = dict.fromkeys(ROLES, 0)
    for address, size in base.items():
        start[roles[address]] += size
    for address, size in unseen.items():
        start[before.roles[address][0]] += size
    inside = [event for event in memory if begins < event.time <= phases["step"].end]
    held = _born_and_alive(inside, phases["backward"].start)
    saved = {place: size for place, size in held.items() if inside[place].address not in known.gathered.roles}
    at_end = _born_and_alive(inside, phases["backward"].end)
    arrivals = [(mark.start, int(mark.name.split(":")[1])) for mark in marks if mark.name.startswith("grad:")]
    course = _Course(dict(base), roles, dict(start), frozenset(saved), known.bucket)
    measured, peak_gradients, more_silent = course.run(inside, arrivals, phases)
    kept = sum(size for place, size in at_end.items() if inside[place].address not in gradients.roles)
    return Course(
        before={role: size for role, size in start.items() if size},
        saved=sum(saved.values()),
        gradients=peak_gradients,
        kept=kept,
        phases=measured,
        unseen=sum(unseen.values()),
        silent=silent + more_silent,
    )


def _alive(events: Iterable[Memory]) -> tuple[dict[int, int], int]:
    """What is allocated after `events`: address -> bytes; and how many addresses came twice without a free."""
    alive: dict[int, int] = {}
    silent = 0
    for event in events:
        if event.size > 0:
            silent += event.address in alive
            alive[event.address] = event.size
        else:
            alive.pop(event.address, None)
    return alive, silent


def _born_and_alive(events: Sequence[Memory], moment: int) -> dict[int, int]:
    """Places in `events` of the allocations that are alive at `moment` -> bytes."""
    alive: dict[int, int] = {}
    for place, event in enumerate(events):
        if event.time > moment:
            break
        if event.size > 0:
            alive[event.address] = place
        else:
            alive.pop(event.address, None)
    return {place: events[place].size for place in alive.values()}


@dataclass
class _Course:
    """The step again, event by event, with every live byte in its role."""

    alive: dict[int, int]
    roles: dict[int, str]
    now: dict[str, int]
    saved: frozenset[int]
    bucket: int

    def run(
        self, events: Sequence[Memory], arrivals: Sequence[tuple[int, int]], phases: Mapping[str, Marked]
    ) -> tuple[dict[str, Phase], int, int]:
        found = {name: Phase() for name in PHASES if name in phases}
        waiting, most, silent = sorted(arrivals, reverse=True), self.now["gradients"], 0
        for place, event in enumerate(events):
            while waiting and waiting[-1][0] <= event.time:
                self._arrive(waiting.pop()[1])
                most = max(most, self.now["gradients"])
            silent += self._take(place, event)
            phase = next((name for name, span in phases.items() if span.start <= event.time <= span.end), None)
            if phase is not None:
                self._look(found[phase])
        return found, most, silent

    def _arrive(self, address: int) -> None:
        if address in self.alive and self.roles[address] in ("transient", "saved"):
            self.now[self.roles[address]] -= self.alive[address]
            self.now["gradients"] += self.alive[address]
            self.roles[address] = "gradients"

    def _take(self, place: int, event: Memory) -> bool:
        silent = False
        if event.size > 0:
            silent = event.address in self.alive
            if silent:
                self._drop(event.address)
            self.alive[event.address] = event.size
            self.roles[event.address] = self._role(place, event)
            self.now[self.roles[event.address]] += event.size
        elif event.address in self.alive:
            self._drop(event.address)
        return silent

    def _role(self, place: int, event: Memory) -> str:
        if self.bucket and event.size == self.bucket:
            return "engine"
        return "saved" if place in self.saved else "transient"

    def _drop(self, address: int) -> None:
        self.now[self.roles.pop(address)] -= self.alive.pop(address)

    def _look(self, phase: Phase) -> None:
        total = sum(self.now.values())
        phase.transient = max(phase.transient, self.now["transient"])
        phase.engine = max(phase.engine, self.now["engine"])
        if total > phase.bytes:
            phase.bytes, phase.of = total, {role: size for role, size in self.now.items() if size}
