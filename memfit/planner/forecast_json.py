"""A forecast as plain JSON values: the contract of `estimate --json`. What is not forecast is null, never 0.

Beside the contract's keys there are `missing` (what the null figures lack, in words), `notes` (what to know of the
model behind the figures), `states_bytes` (per phase, under `gpu`, or under `host` on a CPU run), `parameters` (per
part: trainable and frozen), `short_by_bytes` (under `gpu` and `host`: what is missing there, 0 where it fits) and of
the host its `peak_phase` and `high_bytes` (the upper end of the 90% interval of `peak_bytes`).
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from memfit.planner.activations import device_bytes, peak_of, phase_table
from memfit.planner.estimate import states_place
from memfit.planner.verdict import Room, gpu_room, host_room, process_bytes
from memfit.specs.plan import Forecast

SCHEMA = 1


def forecast_json(forecast: Forecast) -> dict[str, Any]:
    """The object that `memfit estimate --json` prints."""
    hardware, ledger = forecast.hardware, forecast.ledger
    on_gpu, node, interval = states_place(hardware) == "gpu", forecast.node, forecast.interval
    host: dict[str, Any] = {
        "peak_bytes": node.peak_bytes if node else None,
        "pinned_bytes": node.pinned_bytes if node else None,
        "capacity_bytes": hardware.host_memory_bytes,
        "peak_phase": node.peak_phase if node else None,
        "high_bytes": node.high_bytes if node else None,
        "short_by_bytes": _short(host_room(forecast)),
        "terms": [term.to_json() for term in ledger.at("host")],
    }
    if not on_gpu:
        host["states_bytes"] = device_bytes(forecast)
    values = {
        "schema": SCHEMA,
        "verdict": forecast.verdict,
        "fits": forecast.fits,
        "gpu": _gpu(forecast) if on_gpu else None,
        "host": host,
        "disk": {
            "checkpoint_bytes": node.checkpoint_bytes if node else None,
            "nvme_bytes": node.nvme_bytes if node else None,
        },
        "interval": {
            "low_bytes": interval.low_bytes if interval else None,
            "high_bytes": interval.high_bytes if interval else None,
        },
        "speed": _speed(forecast),
        "recipe": forecast.recipe.to_json(),
        "defaults": list(forecast.defaults),
        "hardware": {**dataclasses.asdict(hardware), "text": hardware.text, "ranks": hardware.ranks},
        "workload": dataclasses.asdict(forecast.workload) if forecast.workload else None,
        "parameters": {
            part: {"trainable": forecast.trainable[part], "frozen": forecast.frozen[part]}
            for part in forecast.trainable
        },
        "missing": list(ledger.missing),
        "notes": list(forecast.notes),
    }
    # Tuples become lists, so that what is returned equals what is read back from the printed text.
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _gpu(forecast: Forecast) -> dict[str, Any]:
    row, ledger, peak = forecast.hardware.gpu, forecast.ledger, peak_of(forecast)
    return {
        "peak_allocated_bytes": peak[1] if peak else None,
        "peak_reserved_bytes": forecast.reserved.peak_reserved if forecast.reserved else None,
        "process_bytes": process_bytes(forecast),
        "capacity_bytes": row.capacity_bytes if row else None,
        "short_by_bytes": _short(gpu_room(forecast)),
        "peak_phase": peak[0] if peak else None,
        "phases": dict(phase_table(forecast)),
        "states_bytes": None if forecast.trace else ledger.phase_bytes("gpu"),
        "terms": [term.to_json() for term in ledger.terms if term.place not in {"host", "disk"}],
    }


def _speed(forecast: Forecast) -> dict[str, Any] | None:
    speed = forecast.speed
    return None if speed is None else dataclasses.asdict(speed)


def _short(room: Room | None) -> int | None:
    return None if room is None else room.short
