"""Which value of the answer belongs to which value of the truth, and what became of each.

Values are the leaves of the JSON; a field is the path that leads to them, list positions left out: the price of every
item is the field `items[].price`. Keys are compared as they are; only values are normalised. Lists have no order:
their items are paired so that as many values as possible are right (scipy's linear_sum_assignment), among equals so
that the texts are as alike as possible.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from scipy.optimize import linear_sum_assignment

from memfit.evaluation.normalise import agree, is_empty, leaf_text, plain_text
from memfit.specs.evaluation import FieldCounts, Kind, Outcome

ROOT = "$"  # the field of a truth that is one plain value; JSONPath's name for the whole


class _Absent:
    """The place in the other tree where this one has a value."""


ABSENT = _Absent()


def outcomes(truth: Any, predicted: Any, view: str) -> list[Outcome]:
    """What became of every value of `truth` and of `predicted`, in the order of the truth.

    - right: both say the same; wrong: both say something and it differs
    - missing: the answer says nothing (no key, null, "", {} or []) where the truth does
    - hallucinated: the answer says something where the truth does not: empty there, or no such key or item
    - null: an empty truth rightly left empty
    A plain value where the truth has an object or a list (or the other way round) is hallucinated, and what the truth
    has there is missing. Empty items of lists are no values and are passed over on both sides.
    """
    return _walk(truth, predicted, "", "", view)


def unread(truth: Any, view: str) -> list[Outcome]:
    """The outcomes of an answer that could not be read: every value missing, no null rightly left empty.

    A truth without any value gives one missing value at the root, so that this document cannot count as right.
    """
    rows = [row for row in _walk(truth, ABSENT, "", "", view) if row.kind != "null"]
    return rows or [Outcome(ROOT, ROOT, "missing", None, None, False)]


def count(rows: list[Outcome], truth: Any, view: str) -> FieldCounts:
    """The rows as numbers. `nulls` are the truth's own empty values, so it needs the truth."""
    kinds = Counter(row.kind for row in rows)
    return FieldCounts(
        right=kinds["right"],
        wrong=kinds["wrong"],
        missing=kinds["missing"],
        hallucinated=kinds["hallucinated"],
        null_right=kinds["null"],
        nulls=sum(null_paths(truth, view).values()),
    )


def null_paths(truth: Any, view: str) -> Counter[str]:
    """How many empty values the truth has, by field; empty items of lists are passed over."""
    rows = _walk(truth, ABSENT, "", "", view)
    return Counter(row.path for row in rows if row.kind == "null")


def keys(value: Any) -> Counter[str]:
    """Every key of every object as a path (`items`, `items[].price`), with how often it occurs."""
    found: Counter[str] = Counter()
    stack = [(value, "")]
    while stack:
        node, path = stack.pop()
        if isinstance(node, dict):
            for key, child in node.items():
                inner = _join(path, key)
                found[inner] += 1
                stack.append((child, inner))
        elif isinstance(node, list):
            stack.extend((child, path + "[]") for child in node)
    return found


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _walk(truth: Any, predicted: Any, path: str, at: str, view: str) -> list[Outcome]:
    empty_truth, empty_predicted = _nothing(truth, view), _nothing(predicted, view)
    if empty_truth and empty_predicted:
        # What neither side says is worth a row only where the truth asks for it.
        return [] if truth is ABSENT else [_row(path, at, "null")]
    if isinstance(truth, dict) and isinstance(predicted, dict):
        return _objects(truth, predicted, path, at, view)
    if isinstance(truth, list) and isinstance(predicted, list):
        return _lists(truth, predicted, path, at, view)
    if empty_truth:
        return _alone(predicted, "hallucinated", path, at, view)
    if empty_predicted or isinstance(truth, dict | list) or isinstance(predicted, dict | list):
        return [*_alone(truth, "missing", path, at, view), *_alone(predicted, "hallucinated", path, at, view)]
    right = agree(truth, predicted, view)
    kind: Kind = "right" if right else "wrong"
    strictly = agree(truth, predicted, "strict")
    return [dataclasses.replace(_row(path, at, kind, (plain_text(truth), plain_text(predicted))), strict=strictly)]


def _objects(truth: dict[str, Any], predicted: dict[str, Any], path: str, at: str, view: str) -> list[Outcome]:
    rows: list[Outcome] = []
    for key in [*truth, *(key for key in predicted if key not in truth)]:
        pair = truth.get(key, ABSENT), predicted.get(key, ABSENT)
        rows += _walk(*pair, _join(path, key), _join(at, key), view)
    return rows


def _lists(truth: list[Any], predicted: list[Any], path: str, at: str, view: str) -> list[Outcome]:
    kept = [(place, item) for place, item in enumerate(truth) if not _nothing(item, view)]
    answers = [(place, item) for place, item in enumerate(predicted) if not _nothing(item, view)]
    partner = assign([item for _, item in kept], [item for _, item in answers], view)
    inner = path + "[]"
    rows: list[Outcome] = []
    for index, (place, item) in enumerate(kept):
        answer = answers[partner[index]][1] if index in partner else ABSENT
        rows += _walk(item, answer, inner, f"{at}[{place}]", view)
    taken = set(partner.values())
    for index, (place, item) in enumerate(answers):
        if index not in taken:
            rows += _walk(ABSENT, item, inner, f"{at}[{place}]", view)
    return rows


def assign(truth: list[Any], predicted: list[Any], view: str) -> dict[int, int]:
    """Index of the truth -> index of the answer, no more pairs than the shorter list has items.

    A pair is worth its number of right values plus a likeness that, summed over all pairs, stays below one half: the
    total is largest where the number of right values is.
    """
    if not truth or not predicted:
        return {}
    share = 0.5 / (min(len(truth), len(predicted)) + 1)
    worth = np.empty((len(truth), len(predicted)))
    for i, item in enumerate(truth):
        for j, answer in enumerate(predicted):
            rows = _walk(item, answer, "", "", view)
            worth[i, j] = sum(row.kind == "right" for row in rows) + share * _likeness(rows, view)
    first, second = linear_sum_assignment(worth, maximize=True)
    return {int(i): int(j) for i, j in zip(first, second, strict=True)}


def _likeness(rows: list[Outcome], view: str) -> float:
    """Between 0 and 1: the mean likeness of the texts of the values that both sides have."""
    total = 0.0
    for row in rows:
        if row.kind in ("right", "wrong"):
            pair = leaf_text(row.truth, view), leaf_text(row.predicted, view)
            total += 1.0 if row.kind == "right" else Levenshtein.normalized_similarity(*pair)
    return total / len(rows) if rows else 0.0


def _alone(value: Any, kind: Kind, path: str, at: str, view: str) -> list[Outcome]:
    """The values of one tree that has no partner; a truth's nulls among them are rightly left empty."""
    rows: list[Outcome] = []
    for inner, place, leaf in _leaves(value, path, at):
        if not _nothing(leaf, view):
            text = plain_text(leaf)
            texts = (text, None) if kind == "missing" else (None, text)
            rows.append(_row(inner, place, kind, texts))
        elif kind == "missing" and not place.endswith("]"):
            rows.append(_row(inner, place, "null"))
    return rows


def _leaves(value: Any, path: str, at: str) -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, _join(path, key), _join(at, key))
    elif isinstance(value, list) and value:
        for place, child in enumerate(value):
            yield from _leaves(child, path + "[]", f"{at}[{place}]")
    else:
        yield path, at, value


def _nothing(value: Any, view: str) -> bool:
    return value is ABSENT or is_empty(value, view)


def _row(path: str, at: str, kind: Kind, texts: tuple[str | None, str | None] = (None, None)) -> Outcome:
    """An outcome with the texts of the truth and of the answer, not known to agree strictly."""
    return Outcome(path or ROOT, at or ROOT, kind, *texts, False)
