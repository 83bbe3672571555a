"""The picture of a proof: forecast and measured side by side at the peak of each phase, by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memfit.monitor.canvas import FAINT, INK, Canvas
from memfit.monitor.proof_tables import NOT_TENSORS, phase_rows, verdict
from memfit.units import gib

Row = Mapping[str, Any]
# Group of a row -> colour (Okabe and Ito; those of memfit.monitor.memory_picture).
COLOURS = {
    "weights": "#0072B2",
    "master weights": "#7FB2D8",
    "optimizer states": "#56B4E9",
    "gradients": "#009E73",
    "buffers": "#A0785A",
    "batch": "#F0E442",
    "kept for backward": "#E69F00",
    "temporaries": "#D55E00",
    "engine": "#CC79A7",
    "unexplained": "#222222",
}
WIDTH, LEFT, RIGHT, TOP, BAR, GAP = 900, 96, 150, 84, 16, 22


def picture(proof: Row) -> str:
    """One SVG element; "" where nothing was measured."""
    phases = phase_rows(proof)
    most = max((max(forecast, measured) for _, forecast, measured in phases), default=0)
    if not most:
        return ""
    height = TOP + len(phases) * (2 * BAR + GAP) + 44
    canvas = Canvas(WIDTH, height, verdict(proof))
    canvas.text((16, 28), verdict(proof), 16, bold=True)
    _legend(canvas, proof)
    scale = (WIDTH - LEFT - RIGHT) / most
    for place, (phase, forecast, measured) in enumerate(phases):
        top = TOP + place * (2 * BAR + GAP)
        canvas.text((LEFT - 10, top + BAR + 4), phase, 13, anchor="end")
        rows = _rows_of(proof, phase, measured)
        for line, (key, total) in enumerate((("forecast_bytes", forecast), ("measured_bytes", measured))):
            at = _bar(canvas, (LEFT, top + line * (BAR + 1)), [(row["name"], row[key]) for row in rows], scale)
            name = "forecast" if key.startswith("forecast") else "measured"
            canvas.text((at + 8, top + line * (BAR + 1) + BAR - 4), f"{gib(total)} {name}", 11)
    canvas.line(((LEFT, TOP - 8), (LEFT, height - 40)), FAINT)
    canvas.text((16, height - 14), f"{proof['hardware']}, {proof['kind']} proof", 11, colour="#5a5a5a")
    return canvas.svg()


def _bar(canvas: Canvas, corner: tuple[float, float], pieces: Sequence[tuple[str, int]], scale: float) -> float:
    """A stacked bar; returns where it ends."""
    x, y = corner
    for name, size in pieces:
        if size > 0:
            canvas.rectangle((x, y), size * scale, BAR, COLOURS.get(name, INK))
            x += size * scale
    return x


def _rows_of(proof: Row, phase: str, measured: int) -> list[Row]:
    """The rows of the rank whose sum is shown."""
    by_rank: dict[int, list[Row]] = {}
    for row in proof["compared"]:
        if row["phase"] == phase and row["name"] not in NOT_TENSORS:
            by_rank.setdefault(row["rank"], []).append(row)
    return next(rows for rows in by_rank.values() if sum(row["measured_bytes"] for row in rows) == measured)


def _legend(canvas: Canvas, proof: Row) -> None:
    x = 16.0
    there = {row["name"] for row in proof["compared"] if row["measured_bytes"] > 0 or row["forecast_bytes"] > 0}
    for name, colour in COLOURS.items():
        if name in there:
            canvas.rectangle((x, 48), 12, 12, colour)
            canvas.text((x + 17, 58), name, 11)
            x += 30 + 6.4 * len(name)
