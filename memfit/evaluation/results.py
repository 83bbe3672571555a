"""Scores of a set of answers, and of two sets against each other: the torch-free half of evaluation.

`score` and `compare` are the entry points; how one document is scored stands in tasks.py.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from memfit.errors import UserError
from memfit.evaluation.bootstrap import RESAMPLES, difference, score_with_interval
from memfit.evaluation.metrics import field_rows, macro_f1, sums
from memfit.evaluation.parse import parse_truth, printable
from memfit.evaluation.tasks import TASKS, Scored, TaskRow, detect_task
from memfit.specs.evaluation import (
    VIEWS,
    Comparison,
    Costs,
    Document,
    Evaluation,
    FieldCounts,
    Parsing,
    Score,
    ScoredDocument,
    Slice,
    View,
)

MAX_SLICES = 6  # more kinds of pages than this are put together in groups of about equal size


def score(documents: Sequence[Document], task: str = "auto", seed: int = 0, resamples: int = RESAMPLES) -> Evaluation:
    """Score answers against truths. Raises UserError on no documents or an unknown task.

    `task` is a key of TASKS, or auto: found from the truths. Repeated ids are told apart as `id#2`, `id#3` and counted.
    Half surrogates, which no file in UTF-8 can hold, become U+FFFD in every text.
    """
    if task != "auto" and task not in TASKS:
        raise UserError(f"unknown evaluation task {task!r}", f"tasks are auto, {', '.join(TASKS)}")
    if not documents:
        raise UserError("there are 0 documents to evaluate", "give evaluation data with at least one answered sample")
    unique, repeated = _unique_ids(documents)
    name = detect_task([document.truth for document in unique]) if task == "auto" else task
    row = TASKS[name]
    worked = [row.score(document) for document in unique]
    scored = tuple(entry.document for entry in worked)
    views = {view: _view(worked, row, view, (seed, resamples)) for view in VIEWS}
    return Evaluation(
        task=name,
        headline=row.headline,
        seed=seed,
        resamples=resamples,
        parsing=_parsing(scored, name, repeated),
        strict=views["strict"],
        normalised=views["normalised"],
        costs=_costs(unique),
        slices=_slices(scored, row.headline, (seed, resamples)),
        documents=scored,
    )


def compare(base: Evaluation, tuned: Evaluation, seed: int = 0, resamples: int = RESAMPLES) -> Comparison:
    """The difference tuned minus base on the documents that both answered, resampled in pairs.

    Raises UserError where the two were not scored the same way or share no document, or where truths differ.
    """
    if base.task != tuned.task:
        raise UserError(
            f"cannot compare task {base.task!r} with task {tuned.task!r}", "evaluate both with the same --data and task"
        )
    before, after = _pairs(base, tuned)
    names = TASKS[tuned.task].scores
    parts: dict[str, dict[str, dict[str, Score]]] = {"before": {}, "after": {}, "difference": {}}
    above = 0.0
    for view in VIEWS:
        rows = [[document.view(view) for document in side] for side in (before, after)]
        for part in parts.values():
            part[view] = {}
        for name in names:
            first, second = sums(rows[0], name), sums(rows[1], name)
            parts["before"][view][name] = score_with_interval(first, name, resamples, seed)
            parts["after"][view][name] = score_with_interval(second, name, resamples, seed)
            gap, share = difference(first, second, name, resamples, seed)
            parts["difference"][view][name] = gap
            if view == "normalised" and name == tuned.headline:
                above = share
    return Comparison(
        base=base.name,
        tuned=tuned.name,
        headline=tuned.headline,
        documents=len(before),
        left_out=len(base.documents) + len(tuned.documents) - 2 * len(before),
        seed=seed,
        resamples=resamples,
        share_above=above,
        before=parts["before"],
        after=parts["after"],
        difference=parts["difference"],
    )


def _pairs(base: Evaluation, tuned: Evaluation) -> tuple[list[ScoredDocument], list[ScoredDocument]]:
    known = {document.document.id: document for document in base.documents}
    after = [document for document in tuned.documents if document.document.id in known]
    before = [known[document.document.id] for document in after]
    if not after:
        raise UserError(
            f"the {len(base.documents)} and {len(tuned.documents)} documents have no id in common",
            "evaluate both models with the same --data",
        )
    changed = [b.document.id for b, a in zip(before, after, strict=True) if b.document.truth != a.document.truth]
    if changed:
        raise UserError(
            f"{len(changed)} of {len(after)} documents have two different truths, the first is {changed[0]!r}",
            "the data changed between the two evaluations: run both again",
        )
    return before, after


def _unique_ids(documents: Sequence[Document]) -> tuple[list[Document], int]:
    taken: set[str] = set()
    repeated = 0
    unique: list[Document] = []
    for document in documents:
        texts = printable(
            {"id": document.id, "truth": document.truth, "predicted": document.predicted, "image": document.image}
        )
        name, copies = texts["id"], 1
        while name in taken:
            copies += 1
            name = f"{texts['id']}#{copies}"
        repeated += copies > 1
        taken.add(name)
        unique.append(dataclasses.replace(document, **(texts | {"id": name})))
    return unique, repeated


def _view(documents: Sequence[Scored], row: TaskRow, view: str, draw: tuple[int, int]) -> View:
    seed, resamples = draw
    each = [entry.document.view(view) for entry in documents]
    scores = {name: score_with_interval(sums(each, name), name, resamples, seed) for name in row.scores}
    counts = sum((score.counts for score in each), FieldCounts())
    skipped: dict[str, int] = {}
    for name in {"anls", "tree"} & set(row.scores):
        if missing := sum(getattr(score, name) is None for score in each):
            skipped[name] = missing
    rows = field_rows([(entry.outcomes[view], entry.nulls[view]) for entry in documents], view)
    if "micro_f1" in scores:
        scores["precision"], scores["recall"] = Score(counts.precision), Score(counts.recall)
        scores["macro_f1"] = Score(macro_f1(rows))
    return View(scores=scores, counts=counts, fields=rows, skipped=skipped)


def _parsing(documents: Sequence[ScoredDocument], task: str, repeated: int) -> Parsing:
    states = Counter(document.parse for document in documents)
    structured = sum(parse_truth(document.document.truth)[1] for document in documents)
    return Parsing(
        documents=len(documents),
        valid=states["valid"],
        repaired=states["repaired"],
        unparsable=states["unparsable"],
        duplicate_keys=sum(bool(document.duplicate_keys) for document in documents),
        extra_keys=sum(len(document.extra_keys) for document in documents),
        missing_keys=sum(len(document.missing_keys) for document in documents),
        truths_not_json=len(documents) - structured if task == "json-fields" else 0,
        repeated_ids=repeated,
        unfinished=sum(document.document.finished is False for document in documents),
    )


def _costs(documents: Sequence[Document]) -> Costs:
    def known(name: str) -> list[float]:
        return [value for document in documents if (value := getattr(document, name)) is not None]

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    seconds, peaks = known("seconds"), known("peak_bytes")
    return Costs(
        tokens_per_page=mean(known("tokens")),
        new_tokens_per_page=mean(known("new_tokens")),
        seconds_per_page=mean(seconds),
        seconds=sum(seconds) if seconds else None,
        peak_bytes=int(max(peaks)) if peaks else None,
    )


def _pixels(document: Document) -> int | None:
    return document.width * document.height if document.width and document.height else None


_KINDS: dict[str, Callable[[Document], int | None]] = {"crops": lambda document: document.crops, "pixels": _pixels}


def _slices(documents: Sequence[ScoredDocument], headline: str, draw: tuple[int, int]) -> tuple[Slice, ...]:
    """The headline score by crop count and by image size; nothing where all pages are alike or it is not known."""
    found: list[Slice] = []
    for by, size_of in _KINDS.items():
        sized = [(size, document) for document in documents if (size := size_of(document.document)) is not None]
        groups = _groups([size for size, _ in sized])
        if len(groups) < 2:
            continue
        for low, high in groups:
            part = [document for size, document in sized if low <= size <= high]
            label = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            found.append(_slice((by, label), part, headline, draw))
    return tuple(found)


def _slice(name: tuple[str, str], part: Sequence[ScoredDocument], headline: str, draw: tuple[int, int]) -> Slice:
    (by, label), (seed, resamples) = name, draw
    scores = [document.normalised for document in part]
    return Slice(
        by=by,
        label=label,
        documents=len(part),
        score=score_with_interval(sums(scores, headline), headline, resamples, seed),
        exact=sum(score.exact for score in scores) / len(scores),
        tokens_per_page=_costs([document.document for document in part]).tokens_per_page,
    )


def _groups(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Inclusive ranges: one a size where there are few, else MAX_SLICES ranges of about as many documents each."""
    distinct = sorted(set(sizes))
    if len(distinct) <= MAX_SLICES:
        return [(size, size) for size in distinct]
    parts = [part for part in np.array_split(np.sort(np.array(sizes)), MAX_SLICES) if len(part)]
    ends = sorted({int(part[-1]) for part in parts})
    ranges, low = [], distinct[0]
    for high in ends:
        ranges.append((low, high))
        low = next((size for size in distinct if size > high), high)
    return ranges
