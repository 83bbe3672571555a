"""All headline scores on one scale from 0 to 1, grouped by data: the first thing that a reader of a report sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memfit.monitor.findings import figure, interval, short_names
from memfit.monitor.run_records import RunRecord
from memfit.specs.evaluation import Evaluation

_LINE = 15  # pixels from one run's dot to the next below it


@dataclass(frozen=True)
class Mark:
    """One score; places are per cent of the width. `colour` is a class of the page's style."""

    colour: str
    value: str
    low: str
    span: str
    top: int
    text: str
    interval: str


@dataclass(frozen=True)
class GlanceRow:
    """One evaluation, with a mark for each run that has it."""

    name: str
    about: str
    marks: tuple[Mark, ...]
    height: int


@dataclass(frozen=True)
class GlanceGroup:
    """The evaluations on one set of documents."""

    name: str
    rows: tuple[GlanceRow, ...]


def glance(runs: Sequence[RunRecord]) -> list[GlanceGroup]:
    """The headline scores of all evaluations that have the same headline as the first tuned model."""
    tuned = next((run.tuned for run in runs if run.tuned is not None), None)
    if tuned is None:
        return []
    found = [
        (place, row)
        for place, run in enumerate(runs)
        for row in run.evaluations
        if row.headline == tuned.headline and row.score.value is not None
    ]
    names = short_names([row.data for _, row in found])
    groups: dict[str, dict[str, list[tuple[int, Evaluation]]]] = {}
    for place, row in sorted(found, key=lambda pair: pair[1].data != tuned.data):
        groups.setdefault(row.data, {}).setdefault(row.name, []).append((place, row))
    return [
        GlanceGroup(_title(names[data], rows), tuple(_row(marks, len(runs)) for marks in rows.values()))
        for data, rows in groups.items()
    ]


def _title(name: str, rows: dict[str, list[tuple[int, Evaluation]]]) -> str:
    counts = {row.parsing.documents for marks in rows.values() for _, row in marks}
    low, high = min(counts), max(counts)
    return f"{name or 'documents'}: {low:,}{f' to {high:,}' if high > low else ''} documents"


def _row(marks: list[tuple[int, Evaluation]], runs: int) -> GlanceRow:
    first = marks[0][1]
    drawn = tuple(_mark(row, place if runs > 1 else None, line) for line, (place, row) in enumerate(marks))
    about = "" if first.images == "as-is" else f"{first.images} pictures"
    return GlanceRow(first.name, about, drawn, 26 + _LINE * (len(marks) - 1))


def _mark(row: Evaluation, run: int | None, line: int) -> Mark:
    score = row.score
    value = score.value or 0.0
    low, high = (value if end is None else end for end in (score.low, score.high))
    kind = "control" if row.images != "as-is" else "base" if row.name.startswith("base") else "tuned"
    return Mark(
        colour=f"is-{kind}" if run is None else f"run{run % 6}",
        value=f"{100 * value:.2f}",
        low=f"{100 * low:.2f}",
        span=f"{100 * (high - low):.2f}",
        top=line * _LINE,
        text=figure(value),
        interval=interval(score) if score.low is not None else "",
    )
