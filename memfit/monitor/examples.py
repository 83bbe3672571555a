"""A few documents to look at: the picture, the truth, both answers, and exactly which characters are wrong.

Documents with mistakes come first: what works is soon believed, what does not has to be seen. Pictures are read from
the paths in the run's own evaluation files and from nowhere else.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rapidfuzz.distance import Levenshtein

from memfit.errors import UserError
from memfit.inputs.data.images import ImageError, open_image
from memfit.specs.evaluation import Evaluation, Outcome, ScoredDocument

WRONG_SHOWN, RIGHT_SHOWN = 4, 2
ROWS_SHOWN = 16  # values of one document; those that are not right come first
SIDE = 560  # pixels of the longer side of an embedded picture
LONG_ANSWER = 4000  # characters of a raw answer that are shown
_KNOWN = {
    "right": "right",
    "wrong": "wrong",
    "missing": "missing",
    "hallucinated": "hallucinated",
    "null": "left empty",
}


@dataclass(frozen=True)
class Piece:
    """Characters of an answer: same as the truth, wrong (added or replaced), or a gap (`text` was left out)."""

    text: str
    kind: str


@dataclass(frozen=True)
class Reading:
    """One value in one answer: what became of it and its characters against the truth."""

    kind: str
    word: str
    pieces: tuple[Piece, ...]
    strict: bool


@dataclass(frozen=True)
class ExampleRow:
    """One value: its place, the truth (None where it is empty), and the base's and the tuned model's reading."""

    at: str
    truth: str | None
    base: Reading | None
    tuned: Reading | None


@dataclass(frozen=True)
class Example:
    """One document of the report. `picture` is a data URI, or empty with the reason in `no_picture`."""

    id: str
    verdict: str
    picture: str
    no_picture: str
    width: int
    height: int
    rows: tuple[ExampleRow, ...]
    rows_left: int
    base_answer: str | None
    tuned_answer: str


def choose(tuned: Evaluation) -> list[ScoredDocument]:
    """Up to WRONG_SHOWN documents with mistakes, the worst first, then RIGHT_SHOWN without."""

    def badness(document: ScoredDocument) -> tuple[int, int]:
        counts = document.normalised.counts
        return -(counts.wrong + counts.missing + counts.hallucinated), -document.normalised.edits

    wrong = sorted((document for document in tuned.documents if not document.normalised.exact), key=badness)
    right = [document for document in tuned.documents if document.normalised.exact]
    # Without mistakes to show there is room for more of what works.
    return [*wrong[:WRONG_SHOWN], *right[: RIGHT_SHOWN + max(0, 2 - len(wrong))]]


def make_examples(tuned: Evaluation, base: Evaluation | None) -> list[Example]:
    """The chosen documents with both answers side by side."""
    before = {document.document.id: document for document in base.documents} if base else {}
    return [_example(document, before.get(document.document.id)) for document in choose(tuned)]


def pieces(truth: str | None, predicted: str | None) -> tuple[Piece, ...]:
    """`predicted` in runs of characters that agree with `truth` and that do not; all wrong where there is no truth."""
    if predicted is None:
        return ()
    if truth is None:
        return (Piece(predicted, "wrong"),)
    found = []
    for step in Levenshtein.opcodes(truth, predicted):
        if step.tag == "delete":
            found.append(Piece(truth[step.src_start : step.src_end], "gap"))
        else:
            found.append(Piece(predicted[step.dest_start : step.dest_end], "same" if step.tag == "equal" else "wrong"))
    return tuple(found)


def picture_uri(path: str | None) -> tuple[str, str, tuple[int, int]]:
    """(data URI, "", its size) of the picture at `path`, at most SIDE pixels a side, or ("", the reason, (0, 0))."""
    if not path:
        return "", "no picture is recorded", (0, 0)
    try:
        image = open_image(Path(path))
    except (ImageError, UserError, OSError, MemoryError, ValueError) as error:
        return "", str(error), (0, 0)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return _encoded(image), "", image.size


def _encoded(image: Image.Image) -> str:
    """The smaller of PNG (line art, forms) and JPEG (photographs)."""
    buffers = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        buffers.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, content = min(buffers)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _example(tuned: ScoredDocument, base: ScoredDocument | None) -> Example:
    rows = _rows(tuned, base)
    uri, reason, (width, height) = picture_uri(tuned.document.image)
    return Example(
        id=tuned.document.id,
        verdict=_verdict(tuned),
        picture=uri,
        no_picture=reason,
        width=width,
        height=height,
        rows=tuple(rows[:ROWS_SHOWN]),
        rows_left=max(0, len(rows) - ROWS_SHOWN),
        base_answer=base.document.predicted[:LONG_ANSWER] if base else None,
        tuned_answer=tuned.document.predicted[:LONG_ANSWER],
    )


def _verdict(document: ScoredDocument) -> str:
    counts = document.normalised.counts
    if document.parse == "unparsable":
        return f"the tuned answer could not be read: {document.why}"
    if document.normalised.exact:
        return "all right"
    parts = [
        f"{number} {word}"
        for number, word in (
            (counts.wrong, "wrong"),
            (counts.missing, "missing"),
            (counts.hallucinated, "hallucinated"),
        )
        if number
    ]
    return f"{', '.join(parts)} of {counts.right + counts.wrong + counts.missing} values"


def _rows(tuned: ScoredDocument, base: ScoredDocument | None) -> list[ExampleRow]:
    """Values of both answers by place; where there are too many, those that are not right first."""
    places: dict[tuple[str, str | None], list[Outcome | None]] = {}
    for side, document in enumerate((base, tuned)):
        for outcome in document.outcomes if document else ():
            places.setdefault((outcome.at, outcome.truth), [None, None])[side] = outcome
    unread = [document is not None and document.parse == "unparsable" for document in (base, tuned)]
    rows = [
        ExampleRow(at, truth, _reading(old, unread[0]), _reading(new, unread[1]))
        for (at, truth), (old, new) in places.items()
    ]
    if len(rows) > ROWS_SHOWN:
        rows.sort(key=lambda row: row.tuned is None or row.tuned.kind in ("right", "null"))
    return rows


def _reading(outcome: Outcome | None, unread: bool) -> Reading | None:
    if unread:
        return Reading("missing", "unread", (), False)
    if outcome is None:
        return None
    if outcome.kind == "right":
        return Reading("right", "right", (Piece(outcome.predicted or "", "same"),), outcome.strict)
    return Reading(outcome.kind, _KNOWN[outcome.kind], pieces(outcome.truth, outcome.predicted), outcome.strict)


def has_pictures(examples: Sequence[Example]) -> bool:
    """Whether any picture could be embedded."""
    return any(example.picture for example in examples)
