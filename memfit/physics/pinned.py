"""Page-locked host memory: what torch takes for a pinned tensor is rounded up to a power of two.

Source: ATen/core/CachingHostAllocator.h, `CachingHostAllocatorImpl::allocate` (PowerOf2Ceil of the size) and
c10/core/AllocatorConfig.h, `pinned_max_round_threshold_` and `pinned_max_cached_size_` (no limit by default). So 1.01
GiB takes 2 GiB: up to twice, and a third more for sizes spread evenly between two powers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from memfit.specs.events import MemoryEvent


def pinned_bytes(size: Any, round_up_to: int | None = None) -> Any:
    """Bytes of host memory behind one pinned tensor of `size` bytes: an int, or an int64 array of sizes.

    `round_up_to`: sizes above it stay exact (`pinned_max_round_threshold_mb`, in bytes; None rounds all). 0 takes 0.
    """
    below = size - (size > 0)
    for shift in (1, 2, 4, 8, 16, 32):
        below = below | below >> shift
    rounded = below + (size > 0)
    if round_up_to is None:
        return rounded
    exact = np.where(np.asarray(size) <= round_up_to, rounded, size)
    return exact if isinstance(size, np.ndarray) else int(exact)


def pinned_reserved(events: Iterable[MemoryEvent]) -> int:
    """Bytes of pinned memory held after `events`: the most that were alive at once of every power of two.

    Blocks are neither cut nor joined, and a freed one serves only its own size, so what a size class once needed stays
    until the cache is emptied; "empty_cache" is not followed here, the figure is the peak. A block whose copy to the
    GPU is still under way comes back later (upstream waits for events): then more is needed than this says.
    """
    alive: Counter[int] = Counter()
    peak: Counter[int] = Counter()
    sizes: dict[int, int] = {}
    for event in events:
        if event.kind == "alloc":
            size = sizes[event.key] = int(pinned_bytes(event.bytes))
            alive[size] += 1
            peak[size] = max(peak[size], alive[size])
        elif event.kind == "free":
            alive[sizes.pop(event.key)] -= 1
    return sum(size * count for size, count in peak.items())
