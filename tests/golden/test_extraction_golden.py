"""Documents whose scores were worked out by hand; the working stands beside each in documents.json."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from memfit.evaluation.results import score
from memfit.specs.evaluation import VIEWS, Document, Evaluation

GOLDEN = json.loads((Path(__file__).parent / "data/extraction/documents.json").read_text(encoding="utf-8"))


def documents() -> list[Document]:
    return [Document(id=row["id"], truth=row["truth"], predicted=row["predicted"]) for row in GOLDEN["documents"]]


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return score(documents(), resamples=100)


@pytest.mark.parametrize("row", GOLDEN["documents"], ids=lambda row: row["id"])
def test_reading_and_keys(evaluation: Evaluation, row: dict[str, Any]) -> None:
    found = next(d for d in evaluation.documents if d.document.id == row["id"])
    assert found.parse == row["parse"]
    for name in ("duplicate_keys", "extra_keys", "missing_keys"):
        assert list(getattr(found, name)) == row[name], name


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("row", GOLDEN["documents"], ids=lambda row: row["id"])
def test_scores_of_one_document(evaluation: Evaluation, row: dict[str, Any], view: str) -> None:
    found = next(d for d in evaluation.documents if d.document.id == row["id"]).view(view)
    expected = row[view]
    assert dataclasses.asdict(found.counts) == expected["counts"]
    assert found.exact is expected["exact"]
    assert found.anls == pytest.approx(float(Fraction(expected["anls"])))
    assert found.tree == pytest.approx(float(Fraction(expected["tree"])))
    assert (found.edits, found.characters) == (expected["edits"], expected["characters"])


@pytest.mark.parametrize("view", VIEWS)
def test_totals(evaluation: Evaluation, view: str) -> None:
    expected = GOLDEN["totals"][view]
    found = evaluation.view(view)
    assert dataclasses.asdict(found.counts) == expected["counts"]
    for name in ("micro_f1", "precision", "recall", "exact", "cer"):
        assert found.scores[name].value == pytest.approx(float(Fraction(expected[name]))), name
    for name in ("anls", "tree"):  # means over documents of the hand-computed values
        by_hand = [Fraction(row[view][name]) for row in GOLDEN["documents"]]
        assert found.scores[name].value == pytest.approx(float(sum(by_hand) / len(by_hand))), name


def test_parsing_totals(evaluation: Evaluation) -> None:
    assert dataclasses.asdict(evaluation.parsing) == GOLDEN["totals"]["parsing"]
    assert evaluation.task == "json-fields"


def test_fields_add_up_to_the_total(evaluation: Evaluation) -> None:
    for view in VIEWS:
        rows = evaluation.view(view).fields
        for name in ("right", "wrong", "missing", "hallucinated", "nulls"):
            assert sum(getattr(row.counts, name) for row in rows) == getattr(evaluation.view(view).counts, name)


def test_macro_f1_by_hand(evaluation: Evaluation) -> None:
    """`number` (documents 1, 2, 3, 6, 8, 11): 5 right, 1 missing: 10/11. `tags[]`: 4/7; `total` normalised below."""
    rows = {row.path: row.counts for row in evaluation.normalised.fields}
    assert rows["number"].f1 == pytest.approx(10 / 11)
    assert rows["tags[]"].f1 == pytest.approx(4 / 7)
    # total: missing in 1, right in 3, 7 and 9, wrong in 11: 6 / (6 + 1 + 2)
    assert rows["total"].f1 == pytest.approx(6 / 9)
    # colour and phone have no truth: they count in micro-F1 and not in macro-F1
    assert rows["colour"].f1 is None
    assert rows["phone"].f1 is None
    # 18 filled fields: quantity 8/9, ten at 1 (items' two, the three Chinese, shop.name, rate, issued, due, shipped),
    # four at 0 (date, shop.phone, code, paid)
    by_hand = (10 + Fraction(10, 11) + Fraction(8, 9) + Fraction(6, 9) + Fraction(4, 7)) / 18
    assert evaluation.normalised.scores["macro_f1"].value == pytest.approx(float(by_hand))
