"""What `memfit eval` prints: the change first, then the report's own tables."""

from __future__ import annotations

from collections.abc import Sequence

from memfit.monitor import tables
from memfit.monitor.findings import with_interval
from memfit.monitor.report_text import table_text
from memfit.specs.evaluation import SCORE_NAMES, Comparison, Evaluation


def evaluation_text(evaluations: Sequence[Evaluation], comparison: Comparison | None) -> str:
    """The headline score of each evaluation with its interval, the paired change, all scores, fields, costs."""
    named = [(item.name, item) for item in evaluations]
    first = [
        f"{item.name}: {SCORE_NAMES[item.headline]} {with_interval(item.score)} on {len(item.documents):,} documents"
        + ("" if item.images == "as-is" else f", pictures {item.images}")
        for item in evaluations
    ]
    if comparison is not None:
        change = comparison.difference["normalised"][comparison.headline]
        first.append(f"change: {with_interval(change, signed=True)}, paired over {comparison.documents:,} documents")
    blocks = ["\n".join(first), table_text(tables.scores_table(named)), table_text(tables.reading_table(named))]
    if evaluations[-1].task != "text":
        before = evaluations[0] if len(evaluations) > 1 else None
        blocks.append(table_text(tables.fields_table(before, evaluations[-1])))
    return "\n\n".join(blocks)
