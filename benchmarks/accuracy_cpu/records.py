"""Records: one cell's measured and forecast bytes side by side, their errors, and what the whole grid says."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"
STATES = ("weights", "master", "optimizer", "gradients")
GROUPS = ("states", "saved", "transient", "buffers", "total")
MEDIAN_LIMIT, P95_LIMIT = 0.02, 0.05
WIDTH_LIMIT, COVERAGE = 0.12, (0.85, 0.97)
SMALLEST = 64 * 10**6  # what a cell has to move, in bytes


def measured_groups(course: Mapping[str, Any], alone: bool) -> dict[str, int]:
    """The groups of one measured rank. `buffers` lie beside the states at the peak: batch, the model's, the engine's.

    `alone`: one process. Under an engine, `transient` is that of the peak, with the gradients on their way.
    """
    before = course["before"]
    states = {kind: before.get(kind, 0) for kind in STATES} | {"gradients": course["gradient_tensors"]}
    peak = max(course["phases"].values(), key=lambda phase: int(phase["bytes"]))
    beside = peak["of"].get("transient", 0) + peak["of"].get("gradients", 0)
    return {
        **states,
        "states": sum(states.values()),
        "saved": course["saved"],
        "transient": max(phase["transient"] for phase in course["phases"].values()) if alone else beside,
        "buffers": sum(peak["of"].get(role, 0) for role in ("buffers", "batch", "engine")),
        "total": peak["bytes"],
    }


def predicted_groups(predicted: Mapping[str, Any]) -> dict[str, int | None]:
    """The groups of a forecast; None where there is no figure."""
    states = predicted["states"]
    kinds: dict[str, int | None] = dict.fromkeys((*STATES, "states"))
    if states is not None:
        kinds = {kind: states[kind] for kind in STATES}
        kinds["optimizer"] = states["optimizer"] + states["paged"]
        kinds["states"] = sum(states.values())
    return {**kinds, **{name: predicted[name] for name in ("saved", "transient", "buffers", "total")}}


@dataclass(frozen=True)
class Judged:
    """One cell: `errors` are forecast / measured - 1 by group (None without a figure); `exact` of its states.

    `refused` says why memfit gave no forecast or did not build the cell. `measured`: the fullest rank, and of states
    the largest of any rank.
    """

    id: str
    cell: Mapping[str, Any]
    measured: Mapping[str, int] | None
    forecast: Mapping[str, int | None]
    errors: Mapping[str, float | None]
    exact: bool | None
    refused: str | None
    interval: tuple[int, int] | None


def judge(record: Mapping[str, Any], plant: tuple[str, float] | None = None) -> Judged:
    """A record's errors; `plant` multiplies one group or kind of state of the forecast, and with it the total."""
    forecast = _planted(predicted_groups(record["predicted"]), plant)
    refused = record["predicted"]["refused"] or record["not_measured"]
    ranks = [measured_groups(course, record["cell"]["ranks"] == 1) for course in record["measured"] or ()]
    measured = None
    if ranks:
        fullest = {kind: max(groups[kind] for groups in ranks) for kind in STATES}
        measured = max(ranks, key=lambda groups: groups["total"]) | fullest | {"states": sum(fullest.values())}
    errors: dict[str, float | None] = dict.fromkeys(GROUPS)
    exact = None
    if measured is not None:
        for name in GROUPS:
            value = forecast[name]
            if value is not None:
                errors[name] = value / measured[name] - 1 if measured[name] else float(value > 0)
        if forecast["states"] is not None:
            exact = all(forecast[kind] == measured[kind] for kind in STATES)
    interval = record["predicted"]["interval"]
    return Judged(
        record["id"],
        record["cell"],
        measured,
        forecast,
        errors,
        exact,
        refused,
        tuple(interval) if interval else None,
    )


def _planted(groups: dict[str, int | None], plant: tuple[str, float] | None) -> dict[str, int | None]:
    name, factor = plant or ("", 1.0)
    value = groups.get(name)
    if value is None:
        return groups
    more = round(value * (factor - 1))
    changed = {name, "total"} | ({"states"} if name in STATES else set())
    return {key: old + more if key in changed and old is not None else old for key, old in groups.items()}


@dataclass(frozen=True)
class Verdict:
    """The grid as a whole. `lines` are its figures by group; `red` names every limit that is broken."""

    rows: tuple[tuple[str, int, float, float, float], ...]
    coverage: float | None
    width: float | None
    exact: int
    inexact: tuple[str, ...]
    refused: tuple[str, ...]
    small: tuple[str, ...]
    red: tuple[str, ...]


def verdict(judged: Sequence[Judged]) -> Verdict:
    """Median, 95th percentile and largest absolute error of every group, and what breaks a limit."""
    rows, red = [], []
    for name in GROUPS:
        sizes = sorted(abs(error) for one in judged if (error := one.errors[name]) is not None)
        if not sizes:
            continue
        median, high = statistics.median(sizes), percentile(sizes, 0.95)
        rows.append((name, len(sizes), median, high, sizes[-1]))
        red += [f"{name}: median {median:.2%} above {MEDIAN_LIMIT:.0%}"] * (median > MEDIAN_LIMIT)
        red += [f"{name}: 95th percentile {high:.2%} above {P95_LIMIT:.0%}"] * (high > P95_LIMIT)
    inexact = tuple(one.id for one in judged if one.exact is False)
    red += [f"states are not exact in {len(inexact)} cells"] * bool(inexact)
    known = [one for one in judged if one.interval and one.measured]
    coverage = width = None
    if known:
        coverage = statistics.mean(_covered(one) for one in known)
        width = statistics.median(_width(one) for one in known)
        red += [f"the interval covers {coverage:.0%}"] * (not COVERAGE[0] <= coverage <= COVERAGE[1])
        red += [f"the interval's median width is {width:.1%}"] * (width > WIDTH_LIMIT)
    small = tuple(one.id for one in judged if one.measured and one.measured["total"] < SMALLEST)
    red += [f"{len(small)} cells move less than 64 MB"] * bool(small)
    return Verdict(
        rows=tuple(rows),
        coverage=coverage,
        width=width,
        exact=sum(one.exact is True for one in judged),
        inexact=inexact,
        refused=tuple(one.id for one in judged if one.refused),
        small=small,
        red=tuple(red),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of sorted values: one that was measured, never one in between."""
    return values[max(0, math.ceil(share * len(values)) - 1)]


def _covered(one: Judged) -> bool:
    assert one.interval is not None
    assert one.measured is not None
    return one.interval[0] <= one.measured["total"] <= one.interval[1]


def _width(one: Judged) -> float:
    assert one.interval is not None
    total = one.forecast["total"]
    assert total is not None
    return (one.interval[1] - one.interval[0]) / total


def read_records(folder: Path = RECORDS) -> list[dict[str, Any]]:
    """All records, by cell."""
    lines: Iterable[str] = ()
    if (folder / "cells.jsonl").exists():
        lines = (folder / "cells.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda record: str(record["id"]))


def write_records(records: Iterable[Mapping[str, Any]], folder: Path = RECORDS) -> None:
    """One line a cell."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in sorted(records, key=lambda record: str(record["id"])))
    (folder / "cells.jsonl").write_text(text, encoding="utf-8")
