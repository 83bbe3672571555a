"""From events to figures: what is saved, what the peaks are and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from memfit.families.names import Where
from memfit.specs.trace import Event, PartPeak, PeakRow, SavedRow

INPUT = "input"  # the op of a storage that the batch brought


@dataclass(frozen=True)
class Summary:
    """The figures of one list of events; the fields are those of `StepTrace`."""

    saved: tuple[SavedRow, ...]
    peaks: tuple[PeakRow, ...]
    activation_peaks: tuple[PeakRow, ...]
    parts: tuple[PartPeak, ...]
    gradients: dict[str, int]


def summarize(events: Iterable[Event], locate: Callable[[str], Where]) -> Summary:
    """Replay `events` once to learn what is saved, once more for the peaks. `locate` gives a path's part and block."""
    events = list(events)
    saved = _saved(events)
    rows: dict[Where, int] = {}
    for event in saved.values():
        where = locate(event.path)
        rows[where] = rows.get(where, 0) + event.bytes
    replay = _Replay(set(saved), locate)
    for event in events:
        replay.take(event)
    gradients: dict[str, int] = {}
    for number, name in replay.gradient_of.items():
        if number in replay.alive:
            part = locate(name)[0]
            gradients[part] = gradients.get(part, 0) + replay.alive[number][0]
    return Summary(
        saved=tuple(SavedRow(part, block, size) for (part, block), size in rows.items()),
        peaks=tuple(replay.peaks.values()),
        activation_peaks=tuple(replay.activation_peaks.values()),
        parts=tuple(PartPeak(*key, size) for key, size in replay.parts.items()),
        gradients=gradients,
    )


def _saved(events: Iterable[Event]) -> dict[int, Event]:
    """What is alive when backward begins, inputs and gradients excepted."""
    alive: dict[int, Event] = {}
    for event in events:
        if event.kind == "alloc" and event.op != INPUT:
            alive[event.storage] = event
        elif event.kind in ("free", "gradient"):
            alive.pop(event.storage, None)
        elif event.kind == "phase" and event.phase == "backward":
            break
    return alive


@dataclass
class _Replay:
    """What is alive now, by role, and the largest sums so far."""

    saved: set[int]
    locate: Callable[[str], Where]
    alive: dict[int, tuple[int, str]] = field(default_factory=dict)
    now: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("inputs", "saved", "transient", "gradients"), 0))
    gradient_of: dict[int, str] = field(default_factory=dict)
    peaks: dict[str, PeakRow] = field(default_factory=dict)
    activation_peaks: dict[str, PeakRow] = field(default_factory=dict)
    parts: dict[tuple[str, str, int | None], int] = field(default_factory=dict)
    highest: dict[tuple[str, bool], int] = field(default_factory=dict)  # (phase, with gradients)

    def take(self, event: Event) -> None:
        if event.kind == "alloc":
            role = "inputs" if event.op == INPUT else "saved" if event.storage in self.saved else "transient"
            self.alive[event.storage] = (event.bytes, role)
            self.now[role] += event.bytes
            self._look(event)
        elif event.kind == "free":
            size, role = self.alive.pop(event.storage)
            self.now[role] -= size
        elif event.kind == "gradient":
            size, role = self.alive[event.storage]
            self.now[role] -= size
            self.now["gradients"] += size
            self.alive[event.storage] = (size, "gradients")
            self.gradient_of[event.storage] = event.path
        else:
            self._look(event)

    def _look(self, event: Event) -> None:
        now, phase = self.now, event.phase
        part, block = self.locate(event.path)
        total = sum(now.values())
        for peaks, size in ((self.peaks, total), (self.activation_peaks, total - now["gradients"])):
            old = self.highest.get((phase, peaks is self.peaks))
            if old is None or size > old:
                self.highest[(phase, peaks is self.peaks)] = size
                peaks[phase] = PeakRow(phase, total, **now, part=part, block=block, op=event.op)
        if event.kind == "alloc":
            key = (phase, part, block)
            if now["transient"] >= self.parts.get(key, 0):
                self.parts[key] = now["transient"]
