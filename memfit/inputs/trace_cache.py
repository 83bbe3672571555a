"""Traced steps kept in files, so that a forecast that was made once needs no torch the next time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from memfit.inputs.cache import cache_folder, installed_versions, write_cached
from memfit.inputs.shipped import shipped
from memfit.specs.plan import Reserved
from memfit.specs.stretch import Stretch
from memfit.specs.trace import FlopsRow, Moment, PartPeak, PeakRow, SavedRow, StepTrace

# Raised when a trace or a replay changes what it counts, so that old files are not read as new ones.
FORMAT = 6
ROWS = {"saved": SavedRow, "peaks": PeakRow, "activation_peaks": PeakRow, "parts": PartPeak, "flops": FlopsRow}


def trace_key(*facts: Any) -> str:
    """The key of a traced step: a hash of all that it depends on, and of the versions that ran it."""
    text = json.dumps([FORMAT, installed_versions(), facts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load_trace(key: str) -> StepTrace | None:
    """A cached or shipped trace without its events; None when there is none that can be read."""
    try:
        trace = dict(_read("traces", key)["trace"])
        for name, row in ROWS.items():
            trace[name] = tuple(row(**values) for values in trace[name])
        trace["stretches"] = tuple(Stretch(*row) for row in trace["stretches"])
        trace["timeline"] = tuple(Moment(*row) for row in trace["timeline"])
        trace["substitutions"] = tuple(trace["substitutions"])
        trace["versions"] = tuple(map(tuple, trace["versions"]))
        return StepTrace(**trace)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def load_replay(key: str) -> Reserved | None:
    """A cached or shipped replay; None when there is none that can be read."""
    try:
        values = dict(_read("replays", key)["reserved"])
        return Reserved(**values | {"outside": tuple(map(tuple, values["outside"]))})
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def store_trace(key: str, trace: StepTrace) -> None:
    """Keep a trace; a folder that cannot be written costs the next forecast its speed, no more."""
    write_cached(cache_folder() / "traces" / f"{key}.json", {"trace": trace.to_json()})


def store_replay(key: str, reserved: Reserved) -> None:
    """Keep a replay, as `store_trace` does. There are many of one trace: each card and engine has its own."""
    write_cached(cache_folder() / "replays" / f"{key}.json", {"reserved": dataclasses.asdict(reserved)})


def _read(kind: str, key: str) -> Any:
    try:
        return json.loads((cache_folder() / kind / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return shipped(kind, key)
