"""Evaluation: answers beside truths, what was right in each, and the scores that follow from it.

Everything a report needs stands in `Evaluation.to_json()`, one object per set of answers; nothing has to be
compared a second time to show where an answer went wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

SCHEMA = 1
VIEWS = ("strict", "normalised")

# Every score by its key in `View.scores`, as a person calls it, in the order in which tables show them. Higher is
# better for all but cer.
SCORE_NAMES = {
    "micro_f1": "field F1",
    "precision": "precision",
    "recall": "recall",
    "macro_f1": "macro F1",
    "exact": "exact documents",
    "anls": "ANLS*",
    "tree": "1 − nTED",
    "cer": "character error rate",
}

# What became of one value. `null`: the truth is empty and the answer rightly says nothing there.
Kind = Literal["right", "wrong", "missing", "hallucinated", "null"]
# How an answer was read. `text`: the task compares texts, nothing is parsed.
ParseState = Literal["valid", "repaired", "unparsable", "text"]

T = TypeVar("T")


def _known(cls: type[T], row: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `row` that `cls` has a field for: a file of a later version stays readable."""
    names = {entry.name for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return {name: value for name, value in row.items() if name in names}


@dataclass(frozen=True, kw_only=True)
class Document:
    """One page with its truth and the answer. Figures that were not measured are None.

    `tokens` is the whole prompt, image tokens included; `new_tokens` what was generated; `crops` the slices that
    the image was cut into (1: none); `seconds` and `peak_bytes` belong to the generation of this answer; `finished` is
    False where the answer was cut off at the largest number of new tokens.
    """

    id: str
    truth: str
    predicted: str
    image: str | None = None
    tokens: int | None = None
    new_tokens: int | None = None
    finished: bool | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    width: int | None = None
    height: int | None = None
    crops: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one value, with list items paired by assignment after normalisation.

    `path` names the field (`items[].price`), `at` the place (`items[2].price`, counted in the truth, or in the answer
    where the truth has no such item). `truth` and `predicted` are texts as JSON would show them, None where empty.
    `strict` says whether the pair also agrees without normalisation.
    """

    path: str
    at: str
    kind: Kind
    truth: str | None
    predicted: str | None
    strict: bool


@dataclass(frozen=True)
class FieldCounts:
    """Values counted once each. `nulls` are empty truths, `null_right` those of them that were left empty.

    A wrong value is one false positive and one false negative, as in the CORD and SROIE protocols.
    """

    right: int = 0
    wrong: int = 0
    missing: int = 0
    hallucinated: int = 0
    null_right: int = 0
    nulls: int = 0

    @property
    def false_positives(self) -> int:
        return self.wrong + self.hallucinated

    @property
    def false_negatives(self) -> int:
        return self.wrong + self.missing

    @property
    def precision(self) -> float | None:
        """Share of the predicted values that are right; None when nothing was predicted."""
        predicted = self.right + self.false_positives
        return self.right / predicted if predicted else None

    @property
    def recall(self) -> float | None:
        """Share of the true values that were found; None when there was nothing to find."""
        truths = self.right + self.false_negatives
        return self.right / truths if truths else None

    @property
    def f1(self) -> float | None:
        """2 right / (predicted + true values); None when there was nothing to find."""
        both = 2 * self.right + self.false_positives + self.false_negatives
        return 2 * self.right / both if self.right + self.false_negatives else None

    def __add__(self, other: FieldCounts) -> FieldCounts:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return FieldCounts(*(a + b for a, b in pairs))

    def to_json(self) -> dict[str, Any]:
        """The counts and what follows from them."""
        row: dict[str, Any] = dataclasses.asdict(self)
        return row | {"precision": self.precision, "recall": self.recall, "f1": self.f1}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> FieldCounts:
        return cls(**_known(cls, row))


@dataclass(frozen=True)
class DocumentScore:
    """One document in one view. `anls` and `tree` are None where they were too large to compute (counted apart)."""

    counts: FieldCounts
    exact: bool
    anls: float | None
    tree: float | None
    edits: int
    characters: int

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> DocumentScore:
        known = _known(cls, row)
        return cls(**(known | {"counts": FieldCounts.from_json(known["counts"])}))


@dataclass(frozen=True, kw_only=True)
class ScoredDocument:
    """A document, how its answer was read, and its scores. `why` says what was mended or why reading failed."""

    document: Document
    parse: ParseState
    why: str
    duplicate_keys: tuple[str, ...]
    extra_keys: tuple[str, ...]
    missing_keys: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    strict: DocumentScore
    normalised: DocumentScore

    def view(self, name: str) -> DocumentScore:
        """The scores of one of VIEWS."""
        return self.strict if name == "strict" else self.normalised

    def to_json(self) -> dict[str, Any]:
        row = dataclasses.asdict(self)
        row.update(row.pop("document"))
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> ScoredDocument:
        known = _known(cls, row)
        for name in ("duplicate_keys", "extra_keys", "missing_keys"):
            known[name] = tuple(known[name])
        known["outcomes"] = tuple(Outcome(**_known(Outcome, entry)) for entry in known["outcomes"])
        for name in VIEWS:
            known[name] = DocumentScore.from_json(known[name])
        return cls(document=Document(**_known(Document, row)), **known)


@dataclass(frozen=True)
class Score:
    """A score, and its 95% interval over documents where one was computed. None: not defined on this data."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Score:
        return cls(**_known(cls, row))


@dataclass(frozen=True)
class FieldRow:
    """One field over all documents. `cer` is wrong characters / true characters, invented values left out."""

    path: str
    counts: FieldCounts
    cer: float | None

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "cer": self.cer, **self.counts.to_json()}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> FieldRow:
        return cls(row["path"], FieldCounts.from_json(row), row["cer"])


@dataclass(frozen=True)
class View:
    """All scores under one way of comparing. `skipped` counts documents too large for a score, by score."""

    scores: Mapping[str, Score]
    counts: FieldCounts
    fields: tuple[FieldRow, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "scores": {name: score.to_json() for name, score in self.scores.items()},
            "counts": self.counts.to_json(),
            "fields": [row.to_json() for row in self.fields],
            "skipped": dict(self.skipped),
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> View:
        return cls(
            scores={name: Score.from_json(score) for name, score in row["scores"].items()},
            counts=FieldCounts.from_json(row["counts"]),
            fields=tuple(FieldRow.from_json(entry) for entry in row["fields"]),
            skipped=dict(row.get("skipped", {})),
        )


@dataclass(frozen=True)
class Parsing:
    """How the answers could be read, in documents, except `extra_keys` and `missing_keys`: these count keys."""

    documents: int
    valid: int
    repaired: int
    unparsable: int
    duplicate_keys: int
    extra_keys: int
    missing_keys: int
    truths_not_json: int
    repeated_ids: int = 0
    unfinished: int = 0


@dataclass(frozen=True)
class Costs:
    """Means over the documents that have the figure, None where none has; `peak_bytes` is the largest."""

    tokens_per_page: float | None = None
    new_tokens_per_page: float | None = None
    seconds_per_page: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Slice:
    """The headline score on the documents of one kind (`by`: crops or pixels)."""

    by: str
    label: str
    documents: int
    score: Score
    exact: float
    tokens_per_page: float | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Slice:
        known = _known(cls, row)
        return cls(**(known | {"score": Score.from_json(known["score"])}))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One set of answers, scored. `headline` is the score, in the normalised view, that a summary quotes.

    `name`, `model`, `data`, `images` and `settings` are for whoever generated the answers to fill in with
    `dataclasses.replace`: "tuned"; a folder or hub id; a path; "as-is", "shuffled" or "blank"; {"max_new_tokens": 512}.
    """

    task: str
    headline: str
    seed: int
    resamples: int
    parsing: Parsing
    strict: View
    normalised: View
    costs: Costs
    slices: tuple[Slice, ...]
    documents: tuple[ScoredDocument, ...]
    name: str = ""
    model: str = ""
    data: str = ""
    images: str = "as-is"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def view(self, name: str) -> View:
        """One of VIEWS."""
        return self.strict if name == "strict" else self.normalised

    @property
    def score(self) -> Score:
        """The headline score, normalised."""
        return self.normalised.scores[self.headline]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; documents last, so that a person who opens the file sees the scores first."""
        return {
            "schema": SCHEMA,
            "kind": "evaluation",
            **{key: getattr(self, key) for key in ("name", "model", "data", "images", "task", "headline")},
            "settings": dict(self.settings),
            "seed": self.seed,
            "resamples": self.resamples,
            "parsing": dataclasses.asdict(self.parsing),
            "strict": self.strict.to_json(),
            "normalised": self.normalised.to_json(),
            "costs": dataclasses.asdict(self.costs),
            "slices": [row.to_json() for row in self.slices],
            "documents": [row.to_json() for row in self.documents],
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Evaluation:
        """The evaluation that `to_json` wrote. Raises KeyError or TypeError where the object is not one."""
        known = _known(cls, row)
        known["parsing"] = Parsing(**_known(Parsing, row["parsing"]))
        known["costs"] = Costs(**_known(Costs, row["costs"]))
        for name in VIEWS:
            known[name] = View.from_json(row[name])
        known["slices"] = tuple(Slice.from_json(entry) for entry in row["slices"])
        known["documents"] = tuple(ScoredDocument.from_json(entry) for entry in row["documents"])
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two evaluations of the same documents. `difference` is tuned minus base per view and score, resampled in pairs.

    `left_out` counts documents that only one of the two has; `share_above` is the share of resamples in which the
    headline difference is above zero.
    """

    base: str
    tuned: str
    headline: str
    documents: int
    left_out: int
    seed: int
    resamples: int
    before: Mapping[str, Mapping[str, Score]]
    after: Mapping[str, Mapping[str, Score]]
    difference: Mapping[str, Mapping[str, Score]]
    share_above: float

    def to_json(self) -> dict[str, Any]:
        row = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        for part in ("before", "after", "difference"):
            row[part] = {
                view: {name: score.to_json() for name, score in scores.items()} for view, scores in row[part].items()
            }
        return {"schema": SCHEMA, "kind": "comparison", **row}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Comparison:
        """The comparison that `to_json` wrote. Raises KeyError or TypeError where the object is not one."""
        known = _known(cls, row)
        for part in ("before", "after", "difference"):
            known[part] = {
                view: {name: Score.from_json(score) for name, score in scores.items()}
                for view, scores in row[part].items()
            }
        return cls(**known)
