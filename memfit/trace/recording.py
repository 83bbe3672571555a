"""What one run of a model on fakes gave, and the figures that follow from it. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

from memfit.families.base import Family
from memfit.families.names import Where, locator
from memfit.inputs.cache import installed_versions
from memfit.physics.pinned import pinned_reserved
from memfit.specs.events import EventKind, MemoryEvent
from memfit.specs.trace import Device, Event, FlopsRow, StepTrace
from memfit.trace.folds import Fold
from memfit.trace.summary import summarize
from memfit.trace.timeline import thinned
from memfit.trace.unfold import unfold


@dataclass(frozen=True)
class Recording:
    """The events of a step in which some blocks stand for those of `folds` that were left out.

    `marks`: (index of an event, the block whose operators run from there on). `flops`: (phase, module path) ->
    operations. `inputs` are the bytes of the batch, `parameters` those of all parameters and buffers.
    """

    device: Device
    substitutions: tuple[str, ...]
    parameters: int
    inputs: int
    events: tuple[Event, ...]
    marks: tuple[tuple[int, Where], ...]
    folds: tuple[Fold, ...]
    flops: Mapping[tuple[str, str], int]


def settled(events: Sequence[Event], marks: Sequence[tuple[int, Where]]) -> tuple[Event, ...]:
    """The events with what is freed at one moment in the order it was made: Python's own order may differ."""
    return _in_order(events, {index for index, _ in marks})


def _in_order(events: Sequence[Event], edges: Set[int] = frozenset()) -> tuple[Event, ...]:
    """The events, stretches of frees sorted by storage; none reaches over one of `edges`."""
    found: list[Event] = []
    freed: list[Event] = []
    for index, event in enumerate(events):
        if freed and (event.kind != "free" or index in edges):
            found += sorted(freed, key=lambda row: row.storage)
            freed = []
        (freed if event.kind == "free" else found).append(event)
    return (*found, *sorted(freed, key=lambda row: row.storage))


def step_of(recording: Recording, family: Family) -> StepTrace | None:
    """The traced step with every block written in; None where the blocks that ran are not alike."""
    events: Sequence[Event] | None = recording.events
    if recording.folds:
        events = unfold(recording.events, recording.marks, recording.folds, family.blocks)
    if events is None:
        return None
    events = _in_order(events)
    locate = locator(family)
    on_device = [event for event in events if not event.kind.startswith("host")]
    summary = summarize(on_device, locate)
    return StepTrace(
        device=recording.device,
        substitutions=recording.substitutions,
        inputs=recording.inputs,
        parameters=recording.parameters,
        gradients=summary.gradients,
        saved=summary.saved,
        peaks=summary.peaks,
        activation_peaks=summary.activation_peaks,
        parts=summary.parts,
        flops=_flops(recording, locate),
        versions=installed_versions(),
        timeline=thinned(on_device),
        events=tuple(on_device),
        pinned=_pinned(events),
        written=sum(event.bytes for event in on_device if event.kind == "alloc"),
        kernels=sum(event.kind == "alloc" and event.bytes > 0 for event in on_device),
    )


def _pinned(events: Sequence[Event]) -> int:
    """Page-locked host memory for what checkpointed layers keep there."""
    kinds: dict[str, EventKind] = {"host": "alloc", "host-free": "free"}
    return pinned_reserved(
        MemoryEvent(kinds[event.kind], event.storage, event.bytes) for event in events if event.kind in kinds
    )


def _flops(recording: Recording, locate: Callable[[str], Where]) -> tuple[FlopsRow, ...]:
    """By phase and part; a block counts for all that it stands for."""
    counts: dict[tuple[str, str], int] = {}
    for (phase, path), count in recording.flops.items():
        part, block = locate(path)
        for fold in recording.folds:
            if block is not None and fold.part == part:
                count *= fold.count(block)
        counts[(phase, part)] = counts.get((phase, part), 0) + count
    return tuple(FlopsRow(phase, part, count) for (phase, part), count in counts.items())
