"""Traced steps kept in files, so that a forecast that was made once needs no torch the next time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from memfit.inputs.cache import cache_folder, installed_versions, write_cached
from memfit.specs.plan import Reserved
from memfit.specs.trace import FlopsRow, PartPeak, PeakRow, SavedRow, StepTrace

# Raised when a trace or a replay changes what it counts, so that old files are not read as new ones.
FORMAT = 1
ROWS = {"saved": SavedRow, "peaks": PeakRow, "activation_peaks": PeakRow, "parts": PartPeak, "flops": FlopsRow}


def trace_key(*facts: Any) -> str:
    """The key of a traced step: a hash of all that it depends on, and of the versions that ran it."""
    text = json.dumps([FORMAT, installed_versions(), facts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load_trace(key: str) -> tuple[StepTrace, Reserved | None] | None:
    """A cached trace without its events, and its replay; None when there is none that can be read."""
    try:
        data = json.loads((cache_folder() / "traces" / f"{key}.json").read_text(encoding="utf-8"))
        trace = dict(data["trace"])
        for name, row in ROWS.items():
            trace[name] = tuple(row(**values) for values in trace[name])
        trace["substitutions"] = tuple(trace["substitutions"])
        trace["versions"] = tuple(map(tuple, trace["versions"]))
        reserved = data["reserved"]
        if reserved is not None:
            reserved = Reserved(**reserved | {"outside": tuple(map(tuple, reserved["outside"]))})
        return StepTrace(**trace), reserved
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def store_trace(key: str, trace: StepTrace, reserved: Reserved | None) -> None:
    """Keep a trace and its replay; a folder that cannot be written costs the next forecast its speed, no more."""
    value = {"trace": trace.to_json(), "reserved": dataclasses.asdict(reserved) if reserved else None}
    write_cached(cache_folder() / "traces" / f"{key}.json", value)
