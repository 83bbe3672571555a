"""Sets of answers: intervals, comparison, slices, costs, tasks."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import jiwer
import numpy as np
import pytest

from memfit.errors import UserError
from memfit.evaluation import bootstrap
from memfit.evaluation.metrics import RATIOS, sums
from memfit.evaluation.results import compare, score
from memfit.evaluation.tasks import TASKS, detect_task
from memfit.specs.evaluation import VIEWS, Comparison, Document, Evaluation


def slips(accuracy: float, count: int = 60, seed: int = 0, **extras: Any) -> list[Document]:
    """Slips with four values, each answered rightly with the given probability; truths depend on the number alone."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        truth = {"number": f"{number:04d}", "quantity": number, "total": f"{number}.50", "note": None}
        answer = {
            key: value if chance.random() < accuracy else "?" for key, value in truth.items() if chance.random() < 0.97
        }
        text = "no idea" if chance.random() < 0.02 else json.dumps(answer)
        found.append(Document(id=f"s{number}", truth=json.dumps(truth), predicted=text, **extras))
    return found


# ---------------------------------------------------------------- bootstrap


@pytest.mark.parametrize("name", list(RATIOS))
def test_bootstrap_against_a_plain_loop(name: str) -> None:
    """The same draws, added up document by document."""
    documents = [document.normalised for document in score(slips(0.6, 25), resamples=10).documents]
    found = bootstrap.score_with_interval(sums(documents, name), name, 200, seed=7)
    scores = []
    for weights in np.concatenate(list(bootstrap.draws(25, 200, seed=7))):
        above = below = 0.0
        for document, times in zip(documents, weights, strict=True):
            for _ in range(int(times)):
                a, b = RATIOS[name](document)
                above, below = above + a, below + b
        scores.append(above / below)
    scores.sort()
    # numpy's default percentile: linear between the order statistics around (n - 1) * p
    for quantile, value in ((0.025, found.low), (0.975, found.high)):
        place = (len(scores) - 1) * quantile
        low = scores[int(place)]
        assert value == pytest.approx(low + (scores[int(place) + 1] - low) * (place - int(place)))


def test_draws_are_with_replacement_and_repeatable() -> None:
    weights = np.concatenate(list(bootstrap.draws(40, 500, seed=3)))
    assert weights.shape == (500, 40)
    assert (weights.sum(axis=1) == 40).all()
    # Each count is binomial(40, 1/40): variance 1 - 1/40; 20,000 counts leave about 0.01 of chance.
    assert weights.var() == pytest.approx(1 - 1 / 40, abs=0.06)
    assert (weights == np.concatenate(list(bootstrap.draws(40, 500, seed=3)))).all()
    assert (weights != np.concatenate(list(bootstrap.draws(40, 500, seed=4)))).any()


def test_chunks_cover_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_CELLS", 100)
    assert [len(chunk) for chunk in bootstrap.draws(30, 8, seed=0)] == [3, 3, 2]


def test_interval_of_a_mean_against_theory() -> None:
    """The share of successes p over N documents has the standard error sqrt(p (1 - p) / N)."""
    right = np.array([1.0] * 300 + [0.0] * 100)
    found = bootstrap.score_with_interval(np.stack([right, np.ones(400)], axis=1), "exact", 4000, seed=0)
    error = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert found.value == 0.75
    assert found.low == pytest.approx(0.75 - error, abs=0.005)
    assert found.high == pytest.approx(0.75 + error, abs=0.005)


def test_pairs_make_the_difference_narrower() -> None:
    """Two systems that fail on the same documents: their difference varies less than either score."""
    base, tuned = score(slips(0.5)), score(slips(0.5))
    same = compare(base, tuned)
    assert same.difference["normalised"]["micro_f1"] == dataclasses.replace(
        same.difference["normalised"]["micro_f1"], value=0.0, low=0.0, high=0.0
    )
    assert same.share_above == 0.0
    better = compare(score(slips(0.4)), score(slips(0.9, seed=1)))
    gap = better.difference["normalised"]["micro_f1"]
    assert 0.2 < gap.low < gap.value < gap.high < 0.8
    assert better.share_above == 1.0
    assert gap.value == pytest.approx(
        better.after["normalised"]["micro_f1"].value - better.before["normalised"]["micro_f1"].value
    )


# ---------------------------------------------------------------- comparison


def test_documents_are_paired_by_id() -> None:
    base, tuned = slips(0.3, 20), slips(0.9, 20, seed=5)
    straight = compare(score(base), score(tuned))
    shuffled = compare(score(base[::-1]), score(tuned))
    assert straight.difference == shuffled.difference


def test_documents_of_one_side_only_are_counted() -> None:
    found = compare(score(slips(0.3, 20)), score(slips(0.9, 24)[1:]))
    assert (found.documents, found.left_out) == (19, 1 + 4)


def test_comparing_what_cannot_be_compared() -> None:
    base = score(slips(0.5, 5))
    with pytest.raises(UserError, match="no id in common"):
        compare(base, score([dataclasses.replace(d, id="x" + d.id) for d in slips(0.5, 5)]))
    with pytest.raises(UserError, match="1 of 5 documents have two different truths"):
        compare(base, score([dataclasses.replace(slips(0.5, 5)[0], truth='{"number": "9"}'), *slips(0.5, 5)[1:]]))
    with pytest.raises(UserError, match="cannot compare task"):
        compare(base, score(slips(0.5, 5), task="text"))


# ---------------------------------------------------------------- the whole evaluation


def test_json_round_trip() -> None:
    base = dataclasses.replace(score(slips(0.5, crops=3, tokens=70)), name="base", settings={"max_new_tokens": 64})
    tuned = dataclasses.replace(score(slips(0.9)), name="tuned")
    again = Evaluation.from_json(json.loads(json.dumps(base.to_json())))
    assert again == base
    pair = compare(again, tuned)
    assert Comparison.from_json(json.loads(json.dumps(pair.to_json()))) == pair
    later = base.to_json() | {"a_key_of_next_year": 1}
    assert Evaluation.from_json(later) == base


def test_perfect_answers_score_one() -> None:
    found = score([dataclasses.replace(d, predicted=d.truth) for d in slips(1.0)])
    for view in VIEWS:
        scores = found.view(view).scores
        assert scores["cer"].value == 0.0
        for name in set(scores) - {"cer"}:
            assert scores[name].value == 1.0, name


def test_no_documents_and_unknown_tasks() -> None:
    with pytest.raises(UserError, match="0 documents"):
        score([])
    with pytest.raises(UserError, match="unknown evaluation task 'ocr'"):
        score(slips(1.0, 1), task="ocr")


def test_repeated_ids_are_told_apart_and_counted() -> None:
    one = slips(1.0, 1)[0]
    found = score([one, one, dataclasses.replace(one, id="s0#2")])
    assert [d.document.id for d in found.documents] == ["s0", "s0#2", "s0#2#2"]
    assert found.parsing.repeated_ids == 2


def test_costs_are_means_of_what_was_measured() -> None:
    one, two, three = slips(1.0, 3)
    one = dataclasses.replace(one, tokens=100, seconds=1.0, peak_bytes=5)
    two = dataclasses.replace(two, tokens=200, seconds=2.0, peak_bytes=9, finished=False)
    costs = score([one, two, three]).costs
    assert dataclasses.asdict(costs) == {
        "tokens_per_page": 150.0,
        "new_tokens_per_page": None,
        "seconds_per_page": 1.5,
        "seconds": 3.0,
        "peak_bytes": 9,
    }
    assert score([one, two, three]).parsing.unfinished == 1


def test_slices_by_crops_hold_every_document_once() -> None:
    documents = [dataclasses.replace(d, crops=[1, 3, 9][i % 3]) for i, d in enumerate(slips(0.8))]
    found = score(documents)
    assert [(row.by, row.label, row.documents) for row in found.slices] == [
        ("crops", "1", 20),
        ("crops", "3", 20),
        ("crops", "9", 20),
    ]
    third = score([d for d in documents if d.crops == 9])
    assert found.slices[2].score.value == third.score.value
    assert score(slips(0.8, crops=1)).slices == ()  # all alike: nothing to compare


def test_slices_by_size_are_few_and_complete() -> None:
    chance = random.Random(0)
    documents = [
        dataclasses.replace(d, width=chance.choice([100, 200, 500, 900]), height=chance.randrange(50, 900))
        for d in slips(0.8, 100)
    ]
    found = [row for row in score(documents).slices if row.by == "pixels"]
    assert 2 <= len(found) <= 6
    assert sum(row.documents for row in found) == 100


def test_character_errors_against_jiwer() -> None:
    """jiwer's CER over the texts of one field, a missing answer given as an empty text."""
    chance = random.Random(1)
    words = ["Tea House", "green tea", "Kuchen 7b", "x1"]
    truths = [chance.choice(words) for _ in range(30)]
    answers = [chance.choice([t, t[:-1], t + "z", t.replace("e", "o"), "?"]) for t in truths]
    documents = [
        Document(id=str(i), truth=json.dumps({"name": t}), predicted=json.dumps({"name": a}))
        for i, (t, a) in enumerate(zip(truths, answers, strict=True))
    ]
    documents.append(Document(id="gone", truth='{"name": "Tea House"}', predicted="{}"))
    expected = jiwer.cer([*truths, "Tea House"], [*answers, ""])
    found = score(documents)
    assert found.strict.scores["cer"].value == pytest.approx(expected)
    assert found.strict.fields[0].cer == pytest.approx(expected)


# ---------------------------------------------------------------- tasks


def test_the_task_is_found_from_the_truths() -> None:
    assert detect_task(['{"a": 1}', "[1]", "text"]) == "json-fields"
    assert detect_task(["text", "42", '{"a": 1}']) == "text"
    assert detect_task(["42"]) == "text"  # JSON, but no fields
    assert set(TASKS) == {"json-fields", "text"}


def test_texts() -> None:
    found = score(
        [
            Document(id="1", truth="Paris", predicted="Paris"),
            Document(id="2", truth="Tea House", predicted="Tea  house"),
            Document(id="3", truth="48.50", predicted="$48.5"),
            Document(id="4", truth="yes", predicted="never"),
            Document(id="5", truth="", predicted=""),
        ]
    )
    assert (found.task, found.headline) == ("text", "anls")
    strict = [(d.strict.exact, d.strict.edits, d.strict.characters) for d in found.documents]
    assert strict == [(True, 0, 5), (False, 2, 9), (False, 2, 5), (False, 4, 3), (True, 0, 0)]
    assert [d.normalised.exact for d in found.documents] == [True, False, True, False, True]
    assert found.documents[1].strict.anls == pytest.approx(1.0)  # blanks and case do not count in ANLS
    assert found.documents[3].strict.anls == 0.0
    assert found.normalised.scores["exact"].value == pytest.approx(3 / 5)
    assert "micro_f1" not in found.normalised.scores


def test_a_truth_that_is_no_json_among_json_truths() -> None:
    found = score(
        [
            *slips(1.0, 3),
            Document(id="t", truth="illegible", predicted="illegible"),
            Document(id="u", truth="illegible", predicted='{"a": 1}'),
        ]
    )
    assert found.parsing.truths_not_json == 2
    by_id = {d.document.id: d.normalised for d in found.documents}
    assert by_id["t"].exact
    assert not by_id["u"].exact
    assert {row.path for row in found.normalised.fields} >= {"$", "a"}
