"""The tables of a report, as text cells: the HTML page and the terminal print the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from memfit.monitor.findings import figure, interval, short_names
from memfit.monitor.learned import learning_differences
from memfit.monitor.run_records import ABSENT, RunRecord, flat, number, recipe_differences, value_text
from memfit.specs.evaluation import SCORE_NAMES, Evaluation, FieldCounts, Score
from memfit.units import duration, gib

NOT_YET = "not forecast yet"
_NOT_MEMORY = ("disk", "speed")  # of what a forecast may lack; these have rows of their own
# Rows of `reading_table`, in the order of `_reading_cells`.
READING = (
    *(
        "documents",
        "valid JSON",
        "repaired JSON",
        "unreadable, count as zero",
        "cut off",
        "keys too many",
        "keys missing",
    ),
    *(
        "values hallucinated",
        "values missing",
        "empty truths left empty",
        "tokens a page",
        "time a page",
        "peak memory",
    ),
)


@dataclass(frozen=True)
class Cell:
    """One figure; `under` stands small below it (in a terminal: behind it, in brackets).

    `spark` are two scores between 0 and 1, before and after, that the page shows as dots on a line instead of a text.
    """

    text: str
    under: str = ""
    strong: bool = False
    spark: tuple[float | None, float] | None = None


Cells = tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells under heads; the first column names the row. `note` explains what the figures are."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[Cells, ...]
    note: str = ""


def named_evaluations(runs: Sequence[RunRecord]) -> list[tuple[str, Evaluation]]:
    """All evaluations under their names; of several runs those of one name beside each other, the run named too."""
    if len(runs) == 1:
        return [(row.name, row) for row in runs[0].evaluations]
    names = list(dict.fromkeys(row.name for run in runs for row in run.evaluations))
    found = [(name, run, run.evaluation(name)) for name in names for run in runs]
    return [(f"{name}, {run.name}", row) for name, run, row in found if row is not None]


def scores_table(named: Sequence[tuple[str, Evaluation]]) -> Table:
    """One row an evaluation, one column a score: normalised, with the strict figure under it."""
    keys = [key for key in SCORE_NAMES if any(key in row.normalised.scores for _, row in named)]
    about = abouts([row for _, row in named])
    rows = [
        (Cell(name, text, True), *(_score_cell(row, key) for key in keys))
        for (name, row), text in zip(named, about, strict=True)
    ]
    return Table(
        "Scores",
        ("answers of", *(SCORE_NAMES[key] for key in keys)),
        tuple(rows),
        "Large: after normalisation (width of letters, blanks, numbers, dates, currency). Small: strict, exactly as "
        "written. Answers that cannot be read count as zero everywhere. Lower is better for the character error rate.",
    )


def reading_table(named: Sequence[tuple[str, Evaluation]]) -> Table:
    """How the answers could be read, what was invented or left out, and what they cost: a column an evaluation."""
    columns = [_reading_cells(row) for _, row in named]
    rows = [(Cell(what), *cells) for what, *cells in zip(READING, *columns, strict=True)]
    return Table(
        "Reading, hallucination and cost",
        ("", *(name for name, _ in named)),
        tuple(row for row in rows if any(cell.text != ABSENT for cell in row[1:])),
        "Hallucinated: a value where the truth has none. Missing: no value where the truth has one.",
    )


def fields_table(before: Evaluation | None, after: Evaluation) -> Table:
    """One row a field: F1 before and after, then where the tuned model goes wrong."""
    old = {row.path: row.counts for row in before.normalised.fields} if before else {}
    heads = ("field", *(("F1 base", "0 … 1") if before else ()), "F1 tuned" if before else "F1", "precision", "recall")
    rows = []
    for row in after.normalised.fields:
        counts = row.counts
        first = _before_cells(old.get(row.path), counts.f1) if before else ()
        cells = [Cell(figure(counts.f1), strong=True), *(Cell(figure(v)) for v in (counts.precision, counts.recall))]
        errors = (counts.right, counts.wrong, counts.missing, counts.hallucinated)
        rows.append((Cell(row.path), *first, *cells, Cell(figure(row.cer)), *(Cell(f"{n:,}") for n in errors)))
    return Table(
        "Fields",
        (*heads, "CER", "right", "wrong", "missing", "hallucinated"),
        tuple(rows),
        "Normalised, over all documents. Fields without F1 have no value in any truth.",
    )


def slices_table(evaluation: Evaluation) -> Table | None:
    """The headline score by crop count and by image size; None where all pages are alike."""
    if not evaluation.slices:
        return None
    rows = [
        (
            Cell(f"{row.by}: {row.label}"),
            Cell(f"{row.documents:,}"),
            Cell(figure(row.score.value), interval(row.score), True),
            Cell(f"{row.exact:.1%}"),
            Cell(_count(row.tokens_per_page)),
        )
        for row in evaluation.slices
    ]
    heads = ("pages by", "documents", SCORE_NAMES[evaluation.headline], "exact", "tokens a page")
    return Table("By image size", heads, tuple(rows), "Shows what a cap on crops or pixels costs in accuracy.")


def forecast_table(run: RunRecord) -> Table | None:
    """Forecast beside measured; None where there is neither. What is not forecast says so and is no zero."""
    forecast = run.forecast
    if not forecast and not run.steps:
        return None
    rows = [*_memory_rows(run), *_speed_rows(run)]
    return Table(
        "Forecast against measured",
        ("", "forecast", "measured"),
        tuple(rows),
        "Unexplained is measured minus forecast, never folded into another row.",
    )


def environment_rows(run: RunRecord) -> list[tuple[str, str]]:
    """Versions, hardware and seeds as the run recorded them at its start."""
    start = run.last("start")
    rows = [(name, str(version)) for name, version in (start.get("versions") or {}).items()]
    rows += [
        (key.replace("_", " "), value_text(start[key]))
        for key in ("hardware", "threads", "samples", "eval_samples", "total_steps", "accumulation", "seed")
        if start.get(key) is not None
    ]
    rows += [(f"learning in {part}", f"{count:,}") for part, count in (start.get("trainable") or {}).items()]
    return rows


def recipe_rows(run: RunRecord) -> list[tuple[str, str]]:
    """The effective recipe, one dotted key a row."""
    return [(key, value_text(value)) for key, value in flat(run.recipe).items()] if run.recipe else []


def differences_table(runs: Sequence[RunRecord]) -> Table:
    """Recipe keys in which the runs differ, one column a run."""
    rows = [(Cell(key), *(Cell(value) for value in values)) for key, values in recipe_differences(runs)]
    return Table("What differs in the recipes", ("key", *(run.name for run in runs)), tuple(rows))


def learned_table(runs: Sequence[RunRecord]) -> Table:
    """What decides what is learned, where the runs differ in it."""
    rows = [(Cell(what), *(Cell(value) for value in values)) for what, values in learning_differences(runs)]
    return Table("What differs in what decides what is learned", ("what", *(run.name for run in runs)), tuple(rows))


def runs_table(runs: Sequence[RunRecord]) -> Table:
    """Runs side by side: the headline before and after, and what it cost."""
    rows = []
    for run in runs:
        pair, tuned = run.comparison, run.tuned
        gap = pair.difference["normalised"].get(pair.headline, Score(None)) if pair else Score(None)
        rows.append(
            (
                Cell(run.name, strong=True),
                Cell(SCORE_NAMES[tuned.headline] if tuned else ABSENT),
                Cell(figure(run.base.score.value) if run.base else ABSENT),
                Cell(figure(tuned.score.value), interval(tuned.score), True) if tuned else Cell(ABSENT),
                Cell(f"{gap.value:+.3f}".replace("-", "−"), interval(gap, signed=True))
                if gap.value is not None
                else Cell(ABSENT),
                *_cost_cells(run),
            )
        )
    heads = ("run", "score", "base", "tuned", "difference", "last loss", "steps", "step time", "time", "peak memory")
    return Table("Runs side by side", heads, tuple(rows))


def peak(run: RunRecord, key: str) -> int | None:
    """The largest of a byte figure over all steps; None where no step has it."""
    values = [value for row in run.steps if (value := number(row.get(key))) is not None]
    return int(max(values)) if values else None


def step_seconds(run: RunRecord) -> float | None:
    """Median seconds of a step, waiting for data included; the first step, which warms up, is left out."""
    values = [value for row in run.steps if (value := whole_seconds(row)) is not None]
    return median(values[1:] or values) if values else None


def whole_seconds(row: Mapping[str, Any]) -> float | None:
    """Seconds of one step event, waiting for its data included."""
    seconds = number(row.get("seconds"))
    return None if seconds is None else seconds + (number(row.get("wait_seconds")) or 0.0)


# ---------------------------------------------------------------- forecast against measured


def _memory_rows(run: RunRecord) -> list[Cells]:
    forecast = run.forecast
    on_gpu = bool(forecast.get("gpu")) or (not forecast and peak(run, "peak_bytes") is not None)
    side: Mapping[str, Any] = forecast.get("gpu" if on_gpu else "host") or {}
    states = {phase: size for phase, size in (side.get("states_bytes") or {}).items() if size is not None}
    phase = side.get("peak_phase") or (max(states, key=lambda name: states[name]) if states else None)
    kinds: dict[str, int] = {}
    for term in side.get("terms") or ():
        if (phase is None or phase in term.get("alive", ())) and term.get("place") in ("gpu", "host"):
            kind = str(term.get("name", term.get("id", "?"))).split(", ")[0]
            kinds[kind] = kinds.get(kind, 0) + int(term.get("bytes") or 0)
    rows: list[Cells] = [(Cell(kind), Cell(gib(size)), Cell("")) for kind, size in kinds.items()]
    missing = [str(what) for what in forecast.get("missing") or ()]
    rows += [(Cell(what), Cell(NOT_YET), Cell("")) for what in missing if what not in _NOT_MEMORY]
    measured = peak(run, "peak_bytes" if on_gpu else "rss_bytes")
    planned = side.get("peak_allocated_bytes" if on_gpu else "peak_bytes")
    name = "peak allocated on the GPU" if on_gpu else "peak of the process (RSS)"
    rows.append(_compared(name, planned, measured))
    if on_gpu:
        rows.append(_compared("peak reserved on the GPU", side.get("peak_reserved_bytes"), peak(run, "reserved_bytes")))
    rows.append(_unexplained(planned, measured, sum(kinds.values())))
    rows += [(Cell(what), Cell(NOT_YET), Cell("not measured")) for what in missing if what == "disk"]
    return rows


def _compared(name: str, planned: Any, measured: int | None) -> Cells:
    forecast = gib(planned) if isinstance(planned, int) else NOT_YET
    return Cell(name, strong=True), Cell(forecast, strong=True), Cell(_bytes(measured), strong=True)


def _unexplained(planned: Any, measured: int | None, states: int) -> Cells:
    name = Cell("unexplained", strong=True)
    if measured is None:
        return name, Cell(""), Cell("not measured")
    if isinstance(planned, int):
        gap = measured - planned
        share = f"{gap / planned:+.1%} of the forecast" if planned else ""
        return name, Cell(""), Cell(("−" if gap < 0 else "+") + gib(abs(gap)), share, True)
    return name, Cell(""), Cell(gib(measured - states), "with all that is not forecast yet", True)


def _speed_rows(run: RunRecord) -> list[Cells]:
    speed: Mapping[str, Any] = run.forecast.get("speed") or {}
    planned, seconds = number(speed.get("step_seconds")), step_seconds(run)
    rows: list[Cells] = [
        (
            Cell("seconds a step"),
            Cell(duration(planned) if planned is not None else NOT_YET),
            Cell(duration(seconds) if seconds is not None else "not measured"),
        )
    ]
    tokens = [value for row in run.steps if (value := number(row.get("tokens"))) is not None]
    spent = sum(value for row in run.steps if (value := whole_seconds(row)) is not None)
    planned = number(speed.get("tokens_per_second"))
    if tokens and spent:
        text = f"{planned:,.0f}" if planned is not None else NOT_YET
        rows.append((Cell("tokens a second"), Cell(text), Cell(f"{sum(tokens) / spent:,.0f}")))
    return rows


# ---------------------------------------------------------------- cells


def _score_cell(row: Evaluation, key: str) -> Cell:
    score, strict = row.normalised.scores.get(key), row.strict.scores.get(key)
    if score is None or score.value is None:
        return Cell(ABSENT)
    return Cell(figure(score.value), figure(strict.value if strict else None), key == row.headline)


def _reading_cells(row: Evaluation) -> list[Cell]:
    parsing, counts, costs = row.parsing, row.normalised.counts, row.costs
    read: list[Cell] = [Cell(ABSENT)] * 3
    if row.task != "text":
        read = [Cell(f"{n:,}", f"{n / parsing.documents:.1%}") for n in (parsing.valid, parsing.repaired)]
        read.append(Cell(f"{parsing.unparsable:,}", f"{parsing.unparsable / parsing.documents:.1%}"))
    keys = [Cell(f"{n:,}" if row.task != "text" else ABSENT) for n in (parsing.extra_keys, parsing.missing_keys)]
    nulls = Cell(f"{counts.null_right:,} of {counts.nulls:,}" if counts.nulls else ABSENT)
    seconds = duration(costs.seconds_per_page) if costs.seconds_per_page is not None else ABSENT
    return [
        Cell(f"{parsing.documents:,}"),
        *read,
        Cell(f"{parsing.unfinished:,}"),
        *keys,
        *(Cell(f"{n:,}") for n in (counts.hallucinated, counts.missing)),
        nulls,
        Cell(_count(costs.tokens_per_page)),
        Cell(seconds),
        Cell(_bytes(costs.peak_bytes)),
    ]


def _cost_cells(run: RunRecord) -> list[Cell]:
    losses = [value for row in run.steps if (value := number(row.get("loss"))) is not None]
    seconds, total = step_seconds(run), number(run.last("end").get("seconds"))
    memory = peak(run, "peak_bytes")
    return [
        Cell(f"{losses[-1]:.4f}" if losses else ABSENT),
        Cell(f"{len(run.steps):,}"),
        Cell(duration(seconds) if seconds is not None else ABSENT),
        Cell(duration(total) if total is not None else ABSENT),
        Cell(gib(memory), "GPU") if memory is not None else Cell(_bytes(peak(run, "rss_bytes")), "process"),
    ]


def abouts(rows: Sequence[Evaluation]) -> list[str]:
    """For each evaluation its data, as far as that tells them apart, and its pictures where they were changed."""
    names = short_names([row.data for row in rows])
    pictures = ["" if row.images == "as-is" else f"{row.images} pictures" for row in rows]
    return [", ".join(filter(None, (names[row.data], text))) for row, text in zip(rows, pictures, strict=True)]


def _before_cells(old: FieldCounts | None, after: float | None) -> tuple[Cell, Cell]:
    """A field's F1 before, and both on one line where there is an F1 after."""
    before = old.f1 if old else None
    spark = (before, after) if after is not None else None
    return Cell(figure(before)), Cell("", spark=spark)


def _bytes(count: int | None) -> str:
    return gib(count) if count is not None else ABSENT


def _count(value: float | None) -> str:
    return f"{value:,.0f}" if value is not None else ABSENT
