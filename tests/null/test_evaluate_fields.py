"""Pairing values, counting them, and the two tree measures."""

from __future__ import annotations

import functools
import itertools
import json
import random
from typing import Any

import pytest
from apted import APTED, Config
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from memfit.evaluation import fields, metrics, tree
from memfit.evaluation.metrics import anls_star
from memfit.evaluation.tasks import score_fields
from memfit.specs.evaluation import VIEWS, Document

WORDS = st.sampled_from(["tea", "cake", "12", "12.50", "0417", "2024-03-05", "N/A", "", None, 3, 12.5, True])
VALUES = st.recursive(
    WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
    max_leaves=8,
)
FORMS = st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4) | st.lists(VALUES, max_size=4)


def kinds(truth: Any, predicted: Any, view: str = "strict") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in fields.outcomes(truth, predicted, view):
        found.setdefault(row.kind, []).append(row.at)
    return found


def scored(truth: Any, predicted: Any) -> Any:
    return score_fields(Document(id="x", truth=json.dumps(truth), predicted=json.dumps(predicted))).document


def test_every_kind_of_outcome() -> None:
    truth = {"a": "1", "b": "2", "c": "3", "d": None, "e": "", "f": []}
    predicted = {"a": "1", "b": "9", "d": "x", "e": None, "g": "y", "h": None}
    assert kinds(truth, predicted) == {
        "right": ["a"],
        "wrong": ["b"],
        "missing": ["c"],
        "hallucinated": ["d", "g"],
        "null": ["e", "f"],
    }


def test_a_value_where_an_object_belongs() -> None:
    assert kinds({"shop": {"name": "A", "fax": None}}, {"shop": "A"}) == {
        "missing": ["shop.name"],
        "null": ["shop.fax"],
        "hallucinated": ["shop"],
    }
    assert kinds({"shop": "A"}, {"shop": ["A"]}) == {"missing": ["shop"], "hallucinated": ["shop[0]"]}
    assert kinds({"a": "1"}, ["1"]) == {"missing": ["a"], "hallucinated": ["[0]"]}
    assert kinds({"a": "1"}, "1") == {"missing": ["a"], "hallucinated": ["$"]}


def test_list_items_are_paired_for_the_most_right_values() -> None:
    """Greedy pairing by the first field would take (0, 0) and get 3 right; the best assignment gets 4."""
    truth = [{"n": "a", "p": "1", "q": "5"}, {"n": "a", "p": "2", "q": "6"}]
    predicted = [{"n": "a", "p": "2", "q": "7"}, {"n": "a", "p": "1", "q": "8"}]
    assert fields.assign(truth, predicted, "strict") == {0: 1, 1: 0}
    assert len(kinds(truth, predicted)["right"]) == 4


def test_wrong_items_are_paired_with_their_likes() -> None:
    assert fields.assign(["apple pie", "green tea"], ["green tee", "apple pi"], "strict") == {0: 1, 1: 0}


def test_places_name_the_item() -> None:
    rows = fields.outcomes({"t": ["x", "y"]}, {"t": ["q", "w", "y"]}, "strict")
    assert [(row.path, row.at, row.kind) for row in rows][1] == ("t[]", "t[1]", "right")
    assert {row.at for row in rows if row.kind == "hallucinated"} <= {"t[0]", "t[1]"}


def test_keys_are_counted_as_paths() -> None:
    found = fields.keys({"a": 1, "items": [{"p": 1}, {"p": 2, "q": {"r": 3}}]})
    assert found == {"a": 1, "items": 1, "items[].p": 2, "items[].q": 1, "items[].q.r": 1}


def test_an_unread_answer_cannot_be_right() -> None:
    document = score_fields(Document(id="x", truth='{"a": null}', predicted="sorry")).document
    for view in VIEWS:
        score = document.view(view)
        assert (score.exact, score.anls, score.tree) == (False, 0.0, 0.0)
        assert (score.counts.missing, score.counts.null_right, score.counts.nulls) == (1, 0, 1)


@given(FORMS)
def test_the_truth_itself_scores_one(value: Any) -> None:
    document = scored(value, value)
    for view in VIEWS:
        score = document.view(view)
        assert score.exact
        assert (score.anls, score.tree, score.edits) == (1.0, 1.0, 0)
        assert score.counts.false_positives == score.counts.false_negatives == 0
        assert score.counts.null_right == score.counts.nulls
    assert document.extra_keys == document.missing_keys == ()


@given(FORMS, FORMS)
@settings(max_examples=50)
def test_scores_stay_in_range_and_values_are_counted_once(truth: Any, predicted: Any) -> None:
    document = scored(truth, predicted)
    for view in VIEWS:
        score = document.view(view)
        counts = score.counts
        assert 0 <= score.anls <= 1
        assert 0 <= score.tree <= 1
        assert 0 <= counts.null_right <= counts.nulls
        assert counts.right + counts.false_negatives == _values(truth, view)
        assert counts.right + counts.false_positives == _values(predicted, view)


@given(FORMS, FORMS)
@settings(max_examples=50)
def test_swapping_truth_and_answer_swaps_precision_and_recall(truth: Any, predicted: Any) -> None:
    for view in VIEWS:
        there, back = scored(truth, predicted).view(view).counts, scored(predicted, truth).view(view).counts
        assert (there.right, there.false_positives) == (back.right, back.false_negatives)


@given(FORMS, FORMS, st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_the_order_of_list_items_and_keys_does_not_matter(truth: Any, predicted: Any, chance: random.Random) -> None:
    for view in VIEWS:
        plain = scored(truth, predicted).view(view)
        mixed = scored(_mixed(truth, chance), _mixed(predicted, chance)).view(view)
        for name in ("right", "false_positives", "false_negatives"):
            assert getattr(plain.counts, name) == getattr(mixed.counts, name)
        assert plain.exact == mixed.exact


@given(
    st.lists(st.sampled_from(["a", "b", "c", "ab"]), max_size=5),
    st.lists(st.sampled_from(["a", "b", "cc"]), max_size=5),
)
def test_assignment_is_the_best_of_all(truth: list[str], predicted: list[str]) -> None:
    """Against trying every pairing."""
    short, long = sorted((truth, predicted), key=len)
    best = max(sum(a == b for a, b in zip(short, order, strict=False)) for order in itertools.permutations(long))
    assert len(kinds(truth, predicted).get("right", [])) == best


def _values(value: Any, view: str) -> int:
    return sum(row.kind == "missing" for row in fields.outcomes(value, fields.ABSENT, view))


def _mixed(value: Any, chance: random.Random) -> Any:
    if isinstance(value, list):
        items = [_mixed(item, chance) for item in value]
        chance.shuffle(items)
        return items
    if isinstance(value, dict):
        names = list(value)
        chance.shuffle(names)
        return {name: _mixed(value[name], chance) for name in names}
    return value


# ---------------------------------------------------------------- the tree distance, against two other implementations

Node = tuple[str, bool, tuple]  # text, is a leaf, children


def _plain_tree(value: Any) -> list[Node]:
    """The rules of evaluate/tree.py for strict texts, written a second time."""
    if isinstance(value, dict):
        nodes = [(key, False, tuple(_plain_tree(value[key]))) for key in sorted(value, key=lambda k: (len(k), k))]
        return [node for node in nodes if node[2]]
    if isinstance(value, list):
        found: list[Node] = []
        for item in value:
            if isinstance(item, dict | list):
                inner = tuple(_plain_tree(item))
                found += [("", False, inner)] if inner else []
            else:
                found += _plain_tree(item)
        return found
    text = (
        ""
        if value is None
        else {True: "true", False: "false"}.get(value, str(value))
        if value in (True, False)
        else str(value)
    )
    return [(text, True, ())] if text.strip() else []


def _weight(node: Node) -> int:
    return (len(node[0]) if node[1] else 1) + sum(map(_weight, node[2]))


def _rename(a: Node, b: Node) -> int:
    if a[1] != b[1]:
        return 1 + len(a[0] if a[1] else b[0])
    return Levenshtein.distance(a[0], b[0]) if a[1] else int(a[0] != b[0])


@functools.cache
def _forest_distance(first: tuple[Node, ...], second: tuple[Node, ...]) -> int:
    """The textbook recursion on the last tree of either forest, without any cleverness."""
    if not first or not second:
        return sum(map(_weight, first or second))
    a, b = first[-1], second[-1]
    alone_a, alone_b = (len(n[0]) if n[1] else 1 for n in (a, b))
    return min(
        _forest_distance(first[:-1] + a[2], second) + alone_a,
        _forest_distance(first, second[:-1] + b[2]) + alone_b,
        _forest_distance(first[:-1], second[:-1]) + _forest_distance(a[2], b[2]) + _rename(a, b),
    )


SMALL = st.recursive(
    st.sampled_from(["a", "ab", "12.5", 7, None]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "cc"]), inner, max_size=3),
    max_leaves=5,
)


@given(SMALL, SMALL)
@settings(max_examples=200, deadline=None)
def test_tree_distance_against_the_plain_recursion(first: Any, second: Any) -> None:
    one, two = tuple(_plain_tree(first)), tuple(_plain_tree(second))
    assert tree.tree_distance(first, second, "strict") == _forest_distance(one, two)


class _AptedNode:
    def __init__(self, node: Node) -> None:
        self.name, self.leaf = node[0], node[1]
        self.children = [_AptedNode(child) for child in node[2]]


class _Costs(Config):
    def delete(self, node: _AptedNode) -> int:
        return len(node.name) if node.leaf else 1

    insert = delete

    def rename(self, first: _AptedNode, second: _AptedNode) -> int:
        return _rename((first.name, first.leaf, ()), (second.name, second.leaf, ()))


@pytest.mark.parametrize("seed", range(5))
def test_tree_distance_against_apted_on_tables(seed: int) -> None:
    chance = random.Random(seed)

    def table(rows: int) -> dict[str, Any]:
        return {"items": [{"n": chance.choice(["tea", "cake"]), "p": str(chance.randrange(30))} for _ in range(rows)]}

    first, second = table(chance.randrange(1, 7)), table(chance.randrange(1, 7))
    trees = [_AptedNode(("", False, tuple(_plain_tree(value)))) for value in (first, second)]
    assert tree.tree_distance(first, second, "strict") == APTED(*trees, _Costs()).compute_edit_distance()


def test_trees_that_are_too_large_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MAX_CELLS", 10)
    value = {"a": "1", "b": "2"}
    assert tree.tree_accuracy(value, {"a": "1", "b": "3"}, "strict") is None
    assert tree.tree_accuracy(value, value, "strict") == 1.0


# ---------------------------------------------------------------- ANLS*


def test_values_that_are_too_many_for_anls_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_LEAF_PAIRS", 3)
    value = {"a": "1", "b": "2"}
    assert anls_star(value, {"a": "1", "b": "3"}, "strict") is None  # 2 x 2 values
    assert anls_star(value, {"a": "1"}, "strict") == 0.5
    assert anls_star(value, value, "strict") == 1.0


def test_anls_star_by_hand() -> None:
    """Keys a, b, c: 1 - 1/4 = 0.75; 1/3 alike is below one half: 0; a list with one of two items: 1 of 2 places."""
    truth = {"a": "tree", "b": "abc", "c": ["x", "y"]}
    predicted = {"a": "trea", "b": "a", "c": ["y"]}
    assert anls_star(truth, predicted, "strict") == pytest.approx((0.75 + 0 + 1) / 4)


def test_a_list_of_texts_is_not_a_choice_of_truths() -> None:
    """The library would take the text as right; here it is one value where two items belong."""
    assert anls_star(["yes", "no"], "yes", "strict") == 0.0
