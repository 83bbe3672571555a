"""Does it fit? What is needed beside what is there, on the card and in the node's memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from memfit.planner.estimate import capacity_bytes
from memfit.specs.plan import Forecast


@dataclass(frozen=True)
class Room:
    """One memory: bytes needed at the peak, the upper end of their 90% interval (None where unknown), bytes there."""

    place: str  # gpu | host
    needed: int
    high: int | None
    capacity: int

    @property
    def short(self) -> int:
        """Bytes that are missing; 0 where the peak fits."""
        return max(0, self.needed - self.capacity)


def process_bytes(forecast: Forecast) -> int | None:
    """What the GPU's process takes: the allocator's segments and what lies outside them. None without a replay."""
    if forecast.reserved is None:
        return None
    outside = sum(term.bytes for term in forecast.ledger.terms if term.place in {"context", "comm"})
    return forecast.reserved.peak_reserved + outside


def gpu_room(forecast: Forecast) -> Room | None:
    """The card of the worst rank; None on CPU ranks and where the process is not forecast."""
    needed, capacity = process_bytes(forecast), capacity_bytes(forecast.hardware)
    if forecast.hardware.gpu is None or needed is None or capacity is None:
        return None
    return Room("gpu", needed, forecast.interval.high_bytes if forecast.interval else None, capacity)


def host_room(forecast: Forecast) -> Room | None:
    """Host memory of the fullest node with all its ranks; None where it is not forecast or its size is unknown."""
    node, capacity = forecast.node, forecast.hardware.host_memory_bytes
    return None if node is None or capacity is None else Room("host", node.peak_bytes, node.high_bytes, capacity)


def with_verdict(forecast: Forecast) -> Forecast:
    """The forecast with what follows from its figures.

    A GPU run fits where the allocator's replay succeeds on the card, the process stays within it, and the node's memory
    holds its share where that is known; a CPU run where the node's memory holds everything. Unknown otherwise.
    """
    gpu, host = gpu_room(forecast), host_room(forecast)
    known = [room for room in (gpu, host) if room is not None]
    broken = forecast.reserved is not None and not forecast.reserved.runs
    if forecast.fits is False or broken or any(room.short for room in known):
        return dataclasses.replace(forecast, fits=False, verdict="does-not-fit")
    if (gpu if forecast.hardware.gpu else host) is None:
        return forecast
    close = any(room.high is not None and room.high > room.capacity for room in known)
    return dataclasses.replace(forecast, fits=True, verdict="borderline" if close else "fits")
