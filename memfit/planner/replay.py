"""Replay two training steps through the model of the CUDA caching allocator: reserved is not a share of allocated."""

from __future__ import annotations

from collections.abc import Iterator

from memfit.catalog.context import CONTEXT, LIBRARIES
from memfit.physics.allocator import replay
from memfit.physics.caching import AllocatorOptions
from memfit.planner.estimate import state_tensors
from memfit.planner.parts import PartGroup
from memfit.specs.events import MemoryEvent
from memfit.specs.plan import Forecast, Reserved
from memfit.specs.trace import StepTrace

SOURCE = "replay of two steps (states, traced micro-batches, optimizer) through memfit.physics.allocator"


def replay_steps(forecast: Forecast, groups: tuple[PartGroup, ...], trace: StepTrace) -> Reserved:
    """Weights are loaded, then two optimizer steps of one traced micro-batch each run on the same allocator.

    The second step is the usual one: optimizer states exist while activations come and go.
    """
    expandable = forecast.recipe.levers.allocator == "expandable"
    result = replay(list(_events(forecast, groups, trace)), AllocatorOptions(expandable=expandable))
    return Reserved(
        requested=result.peak_requested,
        peak_allocated=result.peak_allocated,
        peak_reserved=result.peak_reserved,
        outside=(CONTEXT, LIBRARIES),
        source=SOURCE + (", expandable segments" if expandable else ""),
    )


def _events(forecast: Forecast, groups: tuple[PartGroup, ...], trace: StepTrace) -> Iterator[MemoryEvent]:
    key = 0
    for size in state_tensors(forecast, groups, "weights"):
        key += 1
        yield MemoryEvent("alloc", key, size)
    offset, span = key + 1, 1 + max((event.storage for event in trace.events), default=0)
    for step in range(2):
        alive: set[int] = set()
        base = offset + step * span
        for event in trace.events:
            if event.kind == "alloc":
                alive.add(event.storage)
                yield MemoryEvent("alloc", base + event.storage, event.bytes)
            elif event.kind == "free":
                alive.discard(event.storage)
                yield MemoryEvent("free", base + event.storage)
        if step == 0:
            key = offset + 2 * span
            for size in state_tensors(forecast, groups, "optimizer"):
                key += 1
                yield MemoryEvent("alloc", key, size)
        yield from _step_temporary(forecast, offset + 2 * span)
        # zero_grad(set_to_none=True) before the next forward.
        for storage in sorted(alive):
            yield MemoryEvent("free", base + storage)


def _step_temporary(forecast: Forecast, key: int) -> Iterator[MemoryEvent]:
    size = sum(term.bytes for term in forecast.ledger.terms if term.id.startswith("step."))
    if size:
        yield MemoryEvent("alloc", key, size)
        yield MemoryEvent("free", key)
