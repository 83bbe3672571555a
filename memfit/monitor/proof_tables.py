"""A proof as sentences and tables, from proof.json's values: the card, the picture and the report show the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memfit.monitor.tables import Cell, Table
from memfit.specs.ledger import PHASES
from memfit.units import gib

Row = Mapping[str, Any]
SHOWN_TENSORS = 5  # of the twenty in proof.json
NOT_TENSORS = ("process", "checkpoint", "allocator")  # rows of `compared` beside the sums by phase


def verdict(proof: Row) -> str:
    """One line: how many levers are in effect, and the peak against its forecast."""
    checks = proof["checks"]
    good, bad = (sum(check["ok"] is wanted for check in checks) for wanted in (True, False))
    head = f"proof: {good} of {good + bad} checks hold" if bad else f"proof: {good} checks hold"
    return f"{head}{_peak_text(proof)}"


def failed_line(proof: Row) -> tuple[str, str] | None:
    """The problem and the fix of a failed proof; None where nothing failed."""
    bad = [check for check in proof["checks"] if check["ok"] is False]
    if not bad:
        return None
    first = bad[0]
    more = f" (and {len(bad) - 1} more: {', '.join(check['lever'] for check in bad[1:4])})" if len(bad) > 1 else ""
    problem = f"proof failed: {first['lever']}: asked {first['asked']}, found {first['found']}{more}"
    return problem, first["fix"] or first["evidence"]


def _peak_text(proof: Row) -> str:
    measured, expected = proof["peak_measured_bytes"], proof["peak_forecast_bytes"]
    if measured is None or expected is None:
        return ""
    return f", peak {gib(measured)} of {gib(expected)} forecast"


def phase_rows(proof: Row) -> list[tuple[str, int, int]]:
    """(phase, forecast, measured) of the rank that measured most in it, in the order of a step."""
    sums: dict[tuple[str, int], list[int]] = {}
    for row in proof["compared"]:
        if row["name"] not in NOT_TENSORS:
            cell = sums.setdefault((row["phase"], row["rank"]), [0, 0])
            cell[0] += row["forecast_bytes"]
            cell[1] += row["measured_bytes"]
    found = []
    for phase in PHASES:
        ranks = [tuple(cell) for (name, _), cell in sums.items() if name == phase]
        if ranks:
            forecast, measured = max(ranks, key=lambda cell: cell[1])
            found.append((phase, forecast, measured))
    return found


def memory_table(proof: Row) -> Table | None:
    """Bytes of every phase: forecast, measured, and by how much they differ."""
    rows = [
        (Cell(phase), Cell(gib(forecast)), Cell(gib(measured)), Cell(difference(forecast, measured)))
        for phase, forecast, measured in phase_rows(proof)
    ]
    for row in proof["compared"]:
        if row["name"] in ("process", "checkpoint") and row["rank"] == 0:
            name = {"process": "process in host memory", "checkpoint": "checkpoint on disk"}[row["name"]]
            forecast, measured = row["forecast_bytes"], row["measured_bytes"]
            rows.append((Cell(name), Cell(gib(forecast)), Cell(gib(measured)), Cell(difference(forecast, measured))))
    return Table("memory by phase", ("phase", "forecast", "measured", "difference"), tuple(rows)) if rows else None


def groups_table(proof: Row) -> Table | None:
    """What the peak of the highest phase is made of."""
    phases = phase_rows(proof)
    if not phases:
        return None
    highest = max(phases, key=lambda row: row[2])[0]
    inside = [row for row in proof["compared"] if row["phase"] == highest and row["name"] not in NOT_TENSORS]
    rank = max(
        {row["rank"] for row in inside}, key=lambda r: sum(x["measured_bytes"] for x in inside if x["rank"] == r)
    )
    rows = tuple(
        (
            Cell(row["name"]),
            Cell(gib(row["forecast_bytes"])),
            Cell(gib(row["measured_bytes"])),
            Cell(difference(row["forecast_bytes"], row["measured_bytes"])),
        )
        for row in inside
        if row["rank"] == rank
    )
    return Table(f"at the peak of {highest}, rank {rank}", ("group", "forecast", "measured", "difference"), rows)


def tensors_table(proof: Row) -> Table | None:
    """The largest tensors alive at the measured peak."""
    rows = tuple(
        (
            Cell(f"{row['dtype']} {_shape(row['shape'])}"),
            Cell(gib(row["bytes"])),
            Cell(row["term"] or "not in the ledger"),
            Cell(row["module"] or "-"),
            Cell(row["line"] or "-"),
        )
        for row in proof["alive"][:SHOWN_TENSORS]
    )
    heads = ("tensor", "bytes", "term", "module", "line")
    return Table("largest tensors at the peak", heads, rows) if rows else None


def checks_table(proof: Row) -> Table:
    """Every lever that was read back, failed ones first, then those that could not be read."""
    order = {False: 0, None: 1, True: 2}
    rows = tuple(
        (
            Cell(check["lever"]),
            Cell({True: "in effect", False: "FAILED", None: "not read"}[check["ok"]]),
            Cell(check["asked"]),
            Cell(check["found"]),
            Cell(check["evidence"]),
        )
        for check in sorted(proof["checks"], key=lambda check: order[check["ok"]])
    )
    return Table(f"{len(rows)} checks", ("lever", "", "asked", "found", "evidence"), rows)


def difference(forecast: int, measured: int) -> str:
    """Measured less forecast, with its sign and its share; "0" where they are equal."""
    gap = measured - forecast
    if gap == 0:
        return "0"
    text = f"{abs(gap):,} B" if abs(gap) < 1024 else gib(abs(gap))
    share = f" ({100 * gap / forecast:+.2f}%)" if forecast else ""
    return f"{'+' if gap > 0 else '-'}{text}{share}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
