"""The panel of a sweep: one stacked column a value, on one scale, with the line of what there is."""

from __future__ import annotations

from memfit.monitor.canvas import FAINT, INK, PAPER, Canvas, text_width
from memfit.monitor.charts import nice_ticks
from memfit.monitor.memory_picture import COLOURS, GREY
from memfit.planner.estimate import capacity_bytes
from memfit.planner.sweep_text import LEDGER, ledger_of, verdict_text
from memfit.specs.sweep import Sweep, SweepRow
from memfit.units import GIB, MIB, gib

WIDTH, LEFT, RIGHT = 1160, 84, 232
TITLE, PANEL, FOOT = 50, 330, 84


def sweep_height(sweep: Sweep) -> int:
    """Units that the panel takes."""
    return TITLE + PANEL + FOOT


def draw_sweep(canvas: Canvas, sweep: Sweep, start: float) -> None:
    """Draw the panel from `start` downwards."""
    ledgers = [ledger_of(row.forecast) if row.forecast else {} for row in sweep.rows]
    forecasts = [row.forecast for row in sweep.rows if row.forecast is not None]
    capacity = capacity_bytes(forecasts[0].hardware) if forecasts else None
    highest: float = max((sum(one.values()) for one in ledgers), default=0) or 1
    inside = capacity is not None and capacity <= 2.5 * highest
    most = max(highest, capacity or 0 if inside else 0) * 1.08
    top, right = start + TITLE, WIDTH - RIGHT
    bottom = top + PANEL
    unit, name = (GIB, "GiB") if highest >= GIB / 2 else (MIB, "MiB")
    where = "a GPU" if forecasts and forecasts[0].hardware.gpu else "a node"
    canvas.text((24, start + 16), f"{name} {where} over {sweep.key}, of {sweep.held}"[:150], 14, bold=True)

    def y(size: float) -> float:
        return bottom - PANEL * size / most

    for tick in nice_ticks(0, most / unit, 6):
        canvas.line([(LEFT, y(tick * unit)), (right, y(tick * unit))], FAINT, 1)
        canvas.text((LEFT - 8, y(tick * unit) + 4.5), f"{tick:,.10g}", 12, anchor="end", colour=GREY)
    wide = (right - LEFT) / len(sweep.rows)
    for place, ledger in enumerate(ledgers):
        left, level = LEFT + (place + 0.14) * wide, 0
        for group, size in ledger.items():
            canvas.rectangle((left, y(level + size)), 0.72 * wide, y(level) - y(level + size), COLOURS[group][0])
            level += size
    if capacity is not None and inside:
        canvas.line([(LEFT, y(capacity)), (right + 14, y(capacity))], INK, 2, dashed=True)
    for place, (row, ledger) in enumerate(zip(sweep.rows, ledgers, strict=True)):
        middle, level = LEFT + (place + 0.5) * wide, sum(ledger.values())
        if ledger:
            text = f"{level / unit:,.1f}"
            box = text_width(text, 13)
            canvas.rectangle((middle - box / 2, y(level) - 19), box, 16, PAPER)
            canvas.text((middle, y(level) - 6), text, 12, anchor="middle", bold=True)
        canvas.text((middle, bottom + 18), str(row.value), 12, anchor="middle")
        if wide > 60:
            canvas.text((middle, bottom + 35), _verdict(row), 11, anchor="middle", colour=GREY)
    _legend(
        canvas, ledgers, (right + 18, top + 14), f"{gib(capacity)}{'' if inside else ', above'}" if capacity else ""
    )


def _verdict(row: SweepRow) -> str:
    if row.forecast is None:
        return "impossible"
    return verdict_text(row.forecast).removesuffix(" of host")


def _legend(canvas: Canvas, ledgers: list[dict[str, int]], at: tuple[float, float], capacity: str) -> None:
    left, y = at
    if capacity:
        canvas.line([(left - 2, y - 5), (left + 15, y - 5)], INK, 2, dashed=True)
        canvas.text((left + 20, y), capacity, 12, bold=True)
        y += 26
    for group in reversed([group for group in LEDGER if any(one.get(group) for one in ledgers)]):
        canvas.rectangle((left, y - 11), 14, 14, COLOURS[group][0])
        canvas.text((left + 20, y), LEDGER[group], 12)
        y += 20
