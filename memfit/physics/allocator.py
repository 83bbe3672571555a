"""Reserved memory: the allocations and frees of a run, replayed through a model of PyTorch's caching allocator.

What a GPU must hold is not the sum of live tensors but what the allocator has taken from the device: blocks are
rounded, small and large ones live apart, and cached pieces may not suit the next request. The ratio depends on the
order of requests (about 1.03 to 1.36 in training steps), so it is replayed, never scaled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from memfit.physics.caching import (
    ROUND_LARGE,
    AllocatorOptions,
    Block,
    CachingAllocator,
    ExpandableAllocator,
)
from memfit.specs.events import MemoryEvent

__all__ = ["AllocatorOptions", "Replay", "replay", "smallest_reserved"]

DEFAULT = AllocatorOptions()
# A plain row is (kind, key, bytes, ...): what follows is not read, so that a trace's own events can be replayed.
EventRow = MemoryEvent | tuple[Any, ...]
# A trace's remarks on what happens between allocations; they move no memory.
MARKS = ("phase", "gradient")
# position in the events, kind, slot of the storage, exact bytes, rounded bytes, stream
_Step = tuple[int, str, int, int, int, int]


@dataclass(frozen=True)
class Replay:
    """What the allocator's statistics would show, in bytes.

    `peak_requested`: largest sum of the exact sizes alive. `peak_allocated`: the same in blocks, which is
    torch.cuda.max_memory_allocated. `peak_reserved`: torch.cuda.max_memory_reserved. `retries`: how often the cache was
    emptied because the device was full (num_alloc_retries). `oom_at`: the position of the event that found no memory
    even then, or None; the figures end there.
    """

    peak_requested: int
    peak_allocated: int
    peak_reserved: int
    allocated_at_end: int
    reserved_at_end: int
    retries: int
    oom_at: int | None

    @property
    def fragmentation(self) -> float:
        """The share of the reserved peak that the allocated peak does not fill: 0 when all of it is used."""
        return 1 - self.peak_allocated / self.peak_reserved if self.peak_reserved else 0.0


def replay(events: Iterable[EventRow], options: AllocatorOptions = DEFAULT) -> Replay:
    """Run the events, in order, through the allocator with these options.

    Rows are `MemoryEvent`s or tuples that begin with kind, key and bytes, such as the events of a trace. Storages of no
    bytes are no allocation. Raises ValueError where the events contradict themselves: a key that is
    allocated twice, freed without being alive, or of a negative size.
    """
    return _run(_prepare(events, options), options)


def smallest_reserved(events: Iterable[EventRow], options: AllocatorOptions = DEFAULT) -> int:
    """Bytes the allocator must be able to get so that the events still pass, emptying its cache where it has to.

    Found by bisection between the live bytes and the unlimited peak, in steps in which segments are counted: with one
    step less the replay fails. Success is not monotone: what a larger cache still holds may be cut and then serve no
    large request, so a smaller device can pass now and then where this one is the edge. For one given card
    `replay(events, capacity=...)` is the judge. `options.capacity` is ignored.
    """
    steps = _prepare(events, options)
    free_run = _run(steps, replace(options, capacity=None))
    unit = math.gcd(ROUND_LARGE, options.large_segment_size)
    fails, passes = _peak_rounded(steps) // unit - 1, free_run.peak_reserved // unit
    while passes - fails > 1:
        middle = (fails + passes) // 2
        if _run(steps, replace(options, capacity=middle * unit)).oom_at is None:
            passes = middle
        else:
            fails = middle
    return passes * unit


def _prepare(events: Iterable[EventRow], options: AllocatorOptions) -> list[_Step]:
    """The events checked once, with rounded sizes, and each storage under a number of its own."""
    steps: list[_Step] = []
    alive: dict[int, tuple[int, int]] = {}
    slots = 0
    for position, event in enumerate(events):
        if isinstance(event, tuple):
            kind, key, size = event[:3]
            stream = 0
        else:
            kind, key, size, stream = event.kind, event.key, event.bytes, event.stream
        if kind == "alloc":
            if key in alive or size < 0:
                why = "is alive already" if key in alive else f"has {size} bytes"
                raise ValueError(f"event {position}: storage {key} {why}")
            alive[key] = (slots, size)
            if size:
                steps.append((position, kind, slots, size, options.rounded(size), stream))
                slots += 1
        elif kind == "free":
            if key not in alive:
                raise ValueError(f"event {position}: storage {key} is freed but not alive")
            slot, size = alive.pop(key)
            if size:
                steps.append((position, kind, slot, size, 0, stream))
        elif kind == "empty_cache":
            steps.append((position, kind, 0, 0, 0, stream))
        elif kind not in MARKS:
            raise ValueError(f"event {position}: unknown kind {kind!r}")
    return steps


def _run(steps: list[_Step], options: AllocatorOptions) -> Replay:
    allocator = ExpandableAllocator(options) if options.expandable else CachingAllocator(options)
    blocks: dict[int, Block] = {}
    requested = peak_requested = 0
    oom_at = None
    for position, kind, slot, size, rounded, stream in steps:
        if kind == "alloc":
            block = allocator.malloc(rounded, stream)
            if block is None:
                oom_at = position
                break
            blocks[slot] = block
            requested += size
            if requested > peak_requested:
                peak_requested = requested
        elif kind == "free":
            allocator.free(blocks.pop(slot))
            requested -= size
        else:
            allocator.empty_cache()
    return Replay(
        peak_requested=peak_requested,
        peak_allocated=allocator.peak_allocated,
        peak_reserved=allocator.peak_reserved,
        allocated_at_end=allocator.allocated,
        reserved_at_end=allocator.reserved,
        retries=allocator.retries,
        oom_at=oom_at,
    )


def _peak_rounded(steps: list[_Step]) -> int:
    """Largest sum of rounded sizes alive: no allocator can do with less."""
    alive: dict[int, int] = {}
    total = peak = 0
    for _, kind, slot, _, rounded, _ in steps:
        if kind == "alloc":
            alive[slot] = rounded
            total += rounded
            peak = max(peak, total)
        elif kind == "free":
            total -= alive.pop(slot)
    return peak
