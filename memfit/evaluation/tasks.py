"""What is compared: a task is a function from one document to its scores, and a key in TASKS.

A new task is one function and one row here; nothing else names tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memfit.evaluation import fields
from memfit.evaluation.metrics import anls_star, edits, text_anls
from memfit.evaluation.normalise import leaf_text
from memfit.evaluation.parse import parse_answer, parse_truth
from memfit.evaluation.tree import tree_accuracy
from memfit.specs.evaluation import VIEWS, Document, DocumentScore, Outcome, ScoredDocument


@dataclass(frozen=True)
class Scored:
    """A scored document with what the table of fields needs: outcomes and empty truths by field, for each view."""

    document: ScoredDocument
    outcomes: Mapping[str, Sequence[Outcome]]
    nulls: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class TaskRow:
    """`scores` are the ratio scores that the task reports, `headline` the one that a summary quotes."""

    score: Callable[[Document], Scored]
    scores: tuple[str, ...]
    headline: str
    about: str


def detect_task(truths: Sequence[str]) -> str:
    """json-fields where at least half of the truths are a JSON object or array, else text."""
    structured = sum(parse_truth(truth)[1] for truth in truths)
    return "json-fields" if 2 * structured >= max(len(truths), 1) else "text"


def score_fields(document: Document) -> Scored:
    """Compare the values of two JSON texts field by field; see evaluate/fields.py for the rules.

    A truth that is no JSON object or array counts as one text at the root (`$`), so does then an answer.
    """
    truth, structured = parse_truth(document.truth)
    answer = parse_answer(document.predicted)
    if answer.state == "unparsable" and not structured:
        answer = type(answer)(document.predicted, "valid")
    read = answer.state != "unparsable"
    predicted = answer.value if read else fields.ABSENT
    wanted, given = fields.keys(truth), fields.keys(predicted)
    rows = {view: _outcomes(truth, predicted, read, view) for view in VIEWS}
    scores = {view: _field_score(truth, predicted, rows[view], read, view) for view in VIEWS}
    scored = ScoredDocument(
        document=document,
        parse=answer.state,
        why=answer.why,
        duplicate_keys=answer.duplicate_keys,
        extra_keys=tuple(sorted((given - wanted).elements())),
        missing_keys=tuple(sorted((wanted - given).elements())),
        outcomes=tuple(rows["normalised"]),
        strict=scores["strict"],
        normalised=scores["normalised"],
    )
    return Scored(scored, rows, {view: fields.null_paths(truth, view) for view in VIEWS})


def _outcomes(truth: Any, predicted: Any, read: bool, view: str) -> list[Outcome]:
    return fields.outcomes(truth, predicted, view) if read else fields.unread(truth, view)


def _field_score(truth: Any, predicted: Any, rows: list[Outcome], read: bool, view: str) -> DocumentScore:
    counts = fields.count(rows, truth, view)
    wrong, characters = edits(rows, view)
    return DocumentScore(
        counts=counts,
        exact=read and not counts.false_positives and not counts.false_negatives,
        anls=anls_star(truth, predicted, view) if read else 0.0,
        tree=tree_accuracy(truth, predicted, view) if read else 0.0,
        edits=wrong,
        characters=characters,
    )


def score_text(document: Document) -> Scored:
    """Compare two texts as a whole: exact match, ANLS, CER. A truth of blanks wants an answer of blanks."""
    rows = {view: [_text_outcome(document, view)] for view in VIEWS}
    scores = {view: _text_score(document, rows[view][0], view) for view in VIEWS}
    scored = ScoredDocument(
        document=document,
        parse="text",
        why="",
        duplicate_keys=(),
        extra_keys=(),
        missing_keys=(),
        outcomes=tuple(rows["normalised"]),
        strict=scores["strict"],
        normalised=scores["normalised"],
    )
    return Scored(scored, rows, {view: {fields.ROOT: 1} if scores[view].counts.nulls else {} for view in VIEWS})


def _text_outcome(document: Document, view: str) -> Outcome:
    truth, answer = document.truth.strip(), document.predicted.strip()
    (row,) = fields.outcomes(truth, answer, view)  # two plain values give exactly one row
    return row


def _text_score(document: Document, row: Outcome, view: str) -> DocumentScore:
    truth, answer = leaf_text(document.truth.strip(), view), leaf_text(document.predicted.strip(), view)
    wrong, characters = edits([row], view)
    return DocumentScore(
        counts=fields.count([row], document.truth.strip(), view),
        exact=row.kind in ("right", "null"),
        anls=text_anls(truth, answer) if truth or answer else 1.0,
        tree=None,
        edits=wrong,
        characters=characters,
    )


TASKS: dict[str, TaskRow] = {
    "json-fields": TaskRow(
        score_fields,
        ("micro_f1", "exact", "anls", "tree", "cer"),
        "micro_f1",
        "truths are JSON: values compared field by field",
    ),
    "text": TaskRow(score_text, ("exact", "anls", "cer"), "anls", "truths are texts: compared as a whole"),
}
