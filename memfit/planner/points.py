"""What became of every combination of set-up and step: for the picture, and for "why not?" without a second search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from memfit.catalog.context import outside
from memfit.planner.axes import Setup, Step, Trim
from memfit.planner.search import Fit, Miss, Outcome, Search
from memfit.planner.verdict import process_bytes
from memfit.specs.search import Point
from memfit.strategies import STRATEGIES

STATES = ("fits", "refused", "untried")
COLUMNS = (
    *("tier", "state", "seconds", "gpu_bytes", "host_bytes", "short_by_bytes", "place", "exact", "why", "engine"),
)


def points_of(search: Search, outcomes: Sequence[Outcome], why: Callable[[Setup, Step], str]) -> Iterator[Point]:
    """One point a combination, in the order of the search's axes. `why`: why one may not be taken, "" where it may."""
    fits = {_key(fit.candidate.setup, fit.candidate.step): fit for one in outcomes for fit in one.fits}
    misses = {_key(miss.candidate.setup, miss.candidate.step): miss for one in outcomes for miss in one.misses}
    beside = sum(size for _, size, _, _ in outside(search.axes.hardware)) if search.axes.hardware.gpu else 0
    for setup, steps in search.axes.legal.items():
        floors, times = search.least(setup, steps)
        for at, step in enumerate(steps):
            key, because = _key(setup, step), why(setup, step)
            if key in fits:
                yield _fit(fits[key], because)
                continue
            device, host = floors.at(at)
            lacks = np.zeros(device.shape, dtype=np.int64)
            for sizes, room in ((device, search.room.device), (host, search.room.host)):
                lacks = np.maximum(lacks, sizes - room) if room is not None else lacks
            closest = int(lacks.argmin())
            miss = misses.get(key)
            yield Point(
                levers=levers_of_step(setup, step),
                engine=engine_of(setup, miss.candidate.trim if miss else search.tables.trims[setup][closest]),
                tier=max(setup.tier, step.tier),
                state="refused" if miss else "untried",
                seconds=max(float(times[at]), miss.seconds if miss else 0.0),
                gpu_bytes=_gpu(search, miss, int(device[closest]), beside),
                host_bytes=int(host[closest]),
                short_by_bytes=miss.short if miss else 0,
                place=miss.place if miss else "",
                exact=miss is not None and not miss.bound,
                why=because,
            )


def points_json(points: Sequence[Point], timed: bool) -> dict[str, Any]:
    """The points as columns with rows, for plan.json. `timed`: seconds are seconds, and not an order alone."""
    keys = list(points[0].levers) if points else []
    rows = [[*point.levers.values(), *(_plain(getattr(point, name)) for name in COLUMNS)] for point in points]
    return {"timed": timed, "columns": [*keys, *COLUMNS], "rows": rows}


def levers_of_step(setup: Setup, step: Step) -> dict[str, Any]:
    """Every lever that a search sets, by its dotted key, whatever its value."""
    section = STRATEGIES[setup.parallel].section
    found = {
        "levers.parallel": setup.parallel,
        "levers.precision": setup.precision,
        "levers.offload": setup.offload,
        "levers.offload_to": setup.offload_to,
        "levers.optimizer": setup.optimizer,
        "levers.checkpointing": step.checkpointing,
        "levers.loss": step.loss,
        "levers.activation_offload": step.activation_offload,
        "levers.micro_batch": step.micro_batch,
    }
    return found | {"overlap_comm": setup.overlap if section else None}


def engine_of(setup: Setup, trim: Trim) -> dict[str, Any]:
    """What of a trim is off its default."""
    found: dict[str, Any] = dict(trim.engine)
    if setup.offload != "none" and not trim.pin_memory:
        found["pin_memory"] = False
    if trim.allocator != "default":
        found["allocator"] = trim.allocator
    return found


def _fit(fit: Fit, why: str) -> Point:
    forecast, candidate = fit.forecast, fit.candidate
    return Point(
        levers=levers_of_step(candidate.setup, candidate.step),
        engine=engine_of(candidate.setup, candidate.trim),
        tier=candidate.tier,
        state="fits",
        seconds=fit.seconds,
        gpu_bytes=process_bytes(forecast),
        host_bytes=forecast.node.peak_bytes if forecast.node else 0,
        short_by_bytes=0,
        place="",
        exact=True,
        why=why,
    )


def _gpu(search: Search, miss: Miss | None, device: int, beside: int) -> int | None:
    gpu = search.axes.hardware.gpu
    if gpu is None:
        return None
    lacking = gpu.capacity_bytes + miss.short if miss and miss.place == "gpu" else 0
    return max(device + beside, lacking)


def _key(setup: Setup, step: Step) -> tuple[Setup, str]:
    return setup, str(step)


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else value
