"""From the events of runs to charts: loss, learning rates, step time, memory; one run, or several overlaid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memfit.monitor.charts import Chart, Point, Series, smooth, svg, thin
from memfit.monitor.run_records import RunRecord, number
from memfit.monitor.tables import whole_seconds
from memfit.units import GIB, MIB

SMOOTH_SHARE = 25  # the smoothed line averages over one part in so many of all steps
_FEW_STEPS = 60  # below this the raw line is readable and is not smoothed


@dataclass(frozen=True)
class Drawn:
    """A chart as SVG with the words that stand around it."""

    title: str
    picture: str
    note: str = ""


def run_charts(run: RunRecord) -> list[Drawn]:
    """The charts of one run that have something to show."""
    found = [_loss(run), _rates(run), _seconds(run), _memory(run)]
    return [drawn for drawn in found if drawn is not None and drawn.picture]


def overlaid_charts(runs: Sequence[RunRecord]) -> list[Drawn]:
    """The same quantity of several runs in one chart, a colour and a name each."""
    wanted: list[tuple[str, Callable[[Mapping[str, Any]], float | None], Callable[[float], str], bool]] = [
        ("Training loss", lambda row: number(row.get("loss")), _plain, True),
        ("Seconds a step", whole_seconds, _seconds_text, False),
    ]
    found = []
    for title, value, text, log in wanted:
        series = []
        for place, run in enumerate(runs):
            points = _points(run.steps, value)
            series.append(Series(run.name, thin(_smoothed(points)[0]), place))
        chart = Chart(title, tuple(series), text, zero=not log, log=log)
        found.append(Drawn(title, svg(chart), _smoothed(_points(runs[0].steps, value))[1]))
    evals = tuple(
        Series(run.name, _points(run.rows("eval"), lambda row: number(row.get("loss"))), place, "dots")
        for place, run in enumerate(runs)
    )
    found.insert(1, Drawn("Evaluation loss", svg(Chart("Evaluation loss", evals, _plain, log=True))))
    return [drawn for drawn in found if drawn.picture]


def _loss(run: RunRecord) -> Drawn | None:
    points = _points(run.steps, lambda row: number(row.get("loss")))
    line, note = _smoothed(points)
    series = [Series("training", thin(line), 0)]
    if line is not points:
        series.insert(0, Series("every step", thin(points), 0, "faint"))
    evals = _points(run.rows("eval"), lambda row: number(row.get("loss")))
    series.append(Series("held out", evals, 1, "dots"))
    title = "Loss"
    lost = len(run.steps) - len(points)
    if lost:
        note = f"{note} {lost:,} steps have no finite loss.".strip()
    return Drawn(title, svg(Chart(title, tuple(series), _plain, log=True)), note)


def _rates(run: RunRecord) -> Drawn | None:
    parts: dict[str, list[Point]] = {}
    for row in run.steps:
        rates, step = row.get("learning_rate"), number(row.get("step"))
        for part, rate in rates.items() if isinstance(rates, Mapping) else (("all", rates),):
            value = number(rate)
            if value is not None and step is not None:
                parts.setdefault(part, []).append((step, value))
    groups: dict[tuple[Point, ...], list[str]] = {}
    for part, points in parts.items():
        groups.setdefault(tuple(points), []).append(part)
    # Parts with the same rate throughout are one line.
    series = tuple(
        Series("all parts" if len(names) > 1 and len(groups) == 1 else ", ".join(names), thin(points), place)
        for place, (points, names) in enumerate(groups.items())
    )
    note = f"The same for {', '.join(parts)}." if len(groups) == 1 and len(parts) > 1 else ""
    return Drawn("Learning rate", svg(Chart("Learning rate", series, _rate, zero=True)), note)


def _seconds(run: RunRecord) -> Drawn | None:
    points = _points(run.steps, whole_seconds)
    waits = _points(run.steps, lambda row: number(row.get("wait_seconds")))
    series = (Series("step", thin(points), 0), Series("of it: data", thin(waits), 1))
    chart = Chart("Seconds a step", series, _seconds_text, zero=True)
    return Drawn("Time of a step", svg(chart), "Waiting for data is part of the step." if waits else "")


def _memory(run: RunRecord) -> Drawn | None:
    allocated = _points(run.steps, lambda row: number(row.get("peak_bytes")))
    if allocated:
        reserved = _points(run.steps, lambda row: number(row.get("reserved_bytes")))
        series: tuple[Series, ...] = (Series("allocated", thin(allocated), 0), Series("reserved", thin(reserved), 1))
        title, note = "GPU memory, peak of each step", ""
    else:
        series = (Series("process", thin(_points(run.steps, lambda row: number(row.get("rss_bytes")))), 0),)
        title, note = "Memory of the process", "Resident memory after each step; there was no GPU to measure."
    largest = max((y for row in series for _, y in row.points), default=0.0)
    unit, name = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
    chart = Chart(title, series, lambda value: f"{value / unit:.3g} {name}", zero=True, unit=unit)
    return Drawn(title, svg(chart), note)


def _points(rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None]) -> tuple[Point, ...]:
    found = []
    for row in rows:
        step, figure = number(row.get("step")), value(row)
        if step is not None and figure is not None:
            found.append((step, figure))
    return tuple(found)


def _smoothed(points: tuple[Point, ...]) -> tuple[tuple[Point, ...], str]:
    """The line to show in full colour and what was done to it; the points themselves where they are few."""
    if len(points) < _FEW_STEPS:
        return points, ""
    window = max(5, len(points) // SMOOTH_SHARE) | 1
    return smooth(points, window), f"Line: mean over {window} steps."


def _plain(value: float) -> str:
    return f"{value:.3g}"


def _seconds_text(value: float) -> str:
    return f"{value:.3g} s"


def _rate(value: float) -> str:
    if not value:
        return "0"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"
