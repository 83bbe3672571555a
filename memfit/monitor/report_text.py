"""The report for a terminal: the same sentences and tables as the page, in plain text, readable without colour."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from memfit.monitor import tables
from memfit.monitor.findings import facts, findings, headline, seed_summary, with_interval
from memfit.monitor.learned import SAME, says_what_it_learned
from memfit.monitor.proof_tables import memory_table, verdict
from memfit.monitor.run_records import RunRecord
from memfit.specs.evaluation import SCORE_NAMES, Score

_BRACKETS = "Normalised; in brackets strict, exactly as written. Answers that cannot be read count as zero."
_SHORT = {SCORE_NAMES["exact"]: "exact", SCORE_NAMES["cer"]: "CER"}  # heads of narrow columns
_MARKS = {"warn": "!", "note": "-", "good": "+"}


def report_text(runs: Sequence[RunRecord]) -> str:
    """What happened in one run, or in several side by side with their recipe differences first."""
    if len(runs) == 1:
        return _one(runs[0])
    blocks = [f"{len(runs)} runs side by side: {', '.join(run.name for run in runs)}"]
    if summary := seed_summary(runs):
        blocks.append(summary)
    differences = tables.differences_table(runs)
    blocks.append(table_text(differences) if differences.rows else "The recipes are the same.")
    learned = tables.learned_table(runs)
    if learned.rows:
        blocks.append(table_text(learned))
    elif all(map(says_what_it_learned, runs)):
        blocks.append(SAME)
    blocks.append(table_text(tables.runs_table(runs)))
    if named := tables.named_evaluations(runs):
        blocks += [table_text(tables.scores_table(named)), _BRACKETS]
    for run in runs:
        marks = [f"  {_MARKS[row.tone]} {row.text}" for row in findings(run) if row.tone == "warn"]
        if marks:
            blocks.append("\n".join([f"{run.name}:", *marks]))
    return "\n\n".join(blocks)


def table_text(table: tables.Table) -> str:
    """Columns aligned under a title; the first to the left, the others to the right; small figures in brackets.

    Figures in brackets stand where they matter, beside what is strong; columns that hold pictures only are left out.
    """
    shown = [place for place, head in enumerate(table.heads) if not _is_picture(table, place)]
    rows = [[_SHORT.get(table.heads[place], table.heads[place]) for place in shown]]
    rows += [[_cell(row[place], place) for place in shown] for row in table.rows]
    widths = [max(_width(row[column]) for row in rows) for column in range(len(shown))]
    lines = [table.title]
    for row in rows:
        cells = [_pad(row[0], widths[0], left=True)]
        cells += [_pad(cell, width, left=False) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _one(run: RunRecord) -> str:
    blocks = [_top(run)]
    if named := tables.named_evaluations([run]):
        blocks += [table_text(tables.scores_table(named)), _BRACKETS, table_text(tables.reading_table(named))]
    tuned = run.tuned
    if tuned is not None and tuned.task != "text":
        blocks.append(table_text(tables.fields_table(run.base, tuned)))
    if tuned is not None and (sliced := tables.slices_table(tuned)):
        blocks.append(table_text(sliced))
    if forecast := tables.forecast_table(run):
        blocks.append(table_text(forecast))
    if run.proof:
        found = memory_table(run.proof)
        blocks.append(verdict(run.proof) + (f"\n{table_text(found)}" if found else ""))
    return "\n\n".join(blocks)


def _top(run: RunRecord) -> str:
    lines = [f"{run.name}: {headline(run)}"]
    pair = run.comparison
    if pair is not None:
        gap = pair.difference["normalised"].get(pair.headline, Score(None))
        lines.append(f"Difference {with_interval(gap, signed=True)}.")
    lines += ["", *(f"  {name:<10}{value}" for name, value in facts(run))]
    found = findings(run)
    if found:
        lines += ["", *(f"  {_MARKS[row.tone]} {row.text}" for row in found)]
    return "\n".join(lines)


def _is_picture(table: tables.Table, place: int) -> bool:
    return any(row[place].spark is not None for row in table.rows)


def _cell(cell: tables.Cell, place: int) -> str:
    return f"{cell.text} ({cell.under})" if cell.under and cell.strong and place else cell.text


def _width(text: str) -> int:
    """Columns of a terminal: Chinese, Japanese and Korean signs take two."""
    return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text)


def _pad(text: str, width: int, left: bool) -> str:
    room = " " * (width - _width(text))
    return text + room if left else room + text
