"""Measures of one document, and how documents add up to a score.

Every score with an interval is a ratio of two sums over documents (micro-F1: twice the right values / predicted plus
true values; a mean: the documents' values / their number; CER: wrong characters / true characters). That one form is
what the bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from anls_star import anls_score
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

from memfit.evaluation.normalise import is_empty, leaf_text
from memfit.specs.evaluation import DocumentScore, FieldCounts, FieldRow, Outcome

# anls_star pairs list items in pure Python; above this many pairs of leaves (about 5 s) the score is None.
MAX_LEAF_PAIRS = 500_000

Floats = NDArray[np.float64]
Ratio = Callable[[DocumentScore], tuple[float, float]]


def _mean(value: float | None) -> tuple[float, float]:
    return (0.0, 0.0) if value is None else (float(value), 1.0)


def _f1(score: DocumentScore) -> tuple[float, float]:
    counts = score.counts
    return 2.0 * counts.right, 2.0 * counts.right + counts.false_positives + counts.false_negatives


RATIOS: dict[str, Ratio] = {
    "micro_f1": _f1,
    "exact": lambda score: (float(score.exact), 1.0),
    "anls": lambda score: _mean(score.anls),
    "tree": lambda score: _mean(score.tree),
    "cer": lambda score: (float(score.edits), float(score.characters)),
}
# What a ratio is when nothing stands below the line: no value asked for and none given is no mistake.
EMPTY_RATIO = {"micro_f1": 1.0}


def sums(scores: Sequence[DocumentScore], name: str) -> Floats:
    """Numerators and denominators of the score `name`, [N documents, 2]."""
    return np.array([RATIOS[name](score) for score in scores], dtype=np.float64).reshape(len(scores), 2)


def ratio(totals: Floats, name: str) -> Floats:
    """The score from summed [..., 2] numerators and denominators; EMPTY_RATIO or nan where the latter are 0."""
    above, below = totals[..., 0], totals[..., 1]
    safe = np.where(below > 0, below, 1.0)
    return np.where(below > 0, above / safe, EMPTY_RATIO.get(name, np.nan))


def anls_star(truth: Any, predicted: Any, view: str) -> float | None:
    """ANLS* of two JSON values (Peer et al. 2024), threshold 0.5, case ignored; None above MAX_LEAF_PAIRS.

    Lists have no order and list items are paired by assignment; the library's special case of a list of strings as
    alternative truths is switched off.
    """
    goal, answer = _texts(truth, view), _texts(predicted, view)
    if goal == answer:
        return 1.0
    if _leaf_count(goal) * _leaf_count(answer) > MAX_LEAF_PAIRS:
        return None
    return float(anls_score({"": goal}, {"": answer}))  # type: ignore[arg-type]


def text_anls(truth: str, predicted: str) -> float:
    """ANLS of two texts: 1 - normalised edit distance, 0 where that is below 0.5; case ignored."""
    return float(anls_score(truth, predicted))  # type: ignore[arg-type]


def edits(rows: Sequence[Outcome], view: str) -> tuple[int, int]:
    """Wrong characters (insertions, deletions, substitutions) and true characters over all values with a truth.

    A missing value costs all its characters. Hallucinated values have no truth to divide by and are left out.
    """
    wrong = total = 0
    for row in rows:
        if row.truth is not None:
            truth, predicted = leaf_text(row.truth, view), leaf_text(row.predicted, view)
            wrong += Levenshtein.distance(truth, predicted)
            total += len(truth)
    return wrong, total


def field_rows(documents: Sequence[tuple[Sequence[Outcome], Mapping[str, int]]], view: str) -> tuple[FieldRow, ...]:
    """The fields of all documents, each given as its outcomes and its empty truths by field.

    Fields of the truths come first, in the order in which they appear; then those that only answers have.
    """
    groups: dict[str, list[Outcome]] = {}
    nulls: dict[str, int] = {}
    for rows, empty in documents:
        for path, number in empty.items():
            nulls[path] = nulls.get(path, 0) + number
        for row in rows:
            groups.setdefault(row.path, []).append(row)
    for path in nulls:
        groups.setdefault(path, [])
    in_truth = [path for path, rows in groups.items() if path in nulls or any(r.truth is not None for r in rows)]
    order = [*in_truth, *(path for path in groups if path not in set(in_truth))]
    return tuple(_field(path, groups[path], nulls.get(path, 0), view) for path in order)


def _field(path: str, rows: Sequence[Outcome], nulls: int, view: str) -> FieldRow:
    kinds = [row.kind for row in rows]
    counts = FieldCounts(
        right=kinds.count("right"),
        wrong=kinds.count("wrong"),
        missing=kinds.count("missing"),
        hallucinated=kinds.count("hallucinated"),
        null_right=kinds.count("null"),
        nulls=nulls,
    )
    wrong, total = edits(rows, view)
    return FieldRow(path, counts, wrong / total if total else None)


def macro_f1(fields: Sequence[FieldRow]) -> float | None:
    """The mean F1 of the fields that some truth fills; what is invented elsewhere counts in micro-F1 alone."""
    scores = [row.counts.f1 for row in fields if row.counts.f1 is not None]
    return sum(scores) / len(scores) if scores else None


def _texts(value: Any, view: str) -> Any:
    """The same tree with every leaf as the text that `view` compares; None where it is empty."""
    if isinstance(value, dict):
        return {key: _texts(child, view) for key, child in value.items()}
    if isinstance(value, list):
        return [_texts(child, view) for child in value]
    return None if is_empty(value, view) else leaf_text(value, view)


def _leaf_count(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(_leaf_count(child) for child in (value.values() if isinstance(value, dict) else value))
    return 1
