"""Reading answers: strict first, then one repair, then zero."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.evaluation.parse import MAX_DEPTH, depth, parse_answer, parse_truth

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ('Here it is: {"a": "x"}. Anything else?', {"a": "x"}),
        ('{"a": "1", "b": "2', {"a": "1", "b": "2"}),
        ("{'a': 'x', 'b': None}", {"a": "x", "b": None}),
        ('{"a": 1,}', {"a": 1}),
        ('{"a": NaN}', {"a": "NaN"}),  # Python's reader takes it, JSON does not
        ('{"a": 1e999}', {"a": "inf"}),
    ],
)
def test_repaired(text: str, value: object) -> None:
    found = parse_answer(text)
    assert (found.state, found.value) == ("repaired", value)
    assert found.why


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "I cannot read this.",
        "number: 0417",
        "{",
        "[[[[",
        "{{{{",
        "[" * 5000,
        '{"a":' * 5000,
        "nothing {} here",
    ],
)
def test_unparsable(text: str) -> None:
    found = parse_answer(text)
    assert (found.state, found.value) == ("unparsable", None)
    assert found.why


def test_the_depth_limit_is_inclusive() -> None:
    assert parse_answer("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH).state == "valid"
    assert parse_answer("[" * (MAX_DEPTH + 1) + "1" + "]" * (MAX_DEPTH + 1)).state == "unparsable"
    assert [depth(value) for value in (1, [], {"a": 1}, [[]], {"a": [{}]})] == [0, 1, 1, 2, 3]


def test_duplicate_keys_are_named_at_every_level() -> None:
    found = parse_answer('{"a": 1, "b": {"c": 1, "c": 2}, "a": 3}')
    assert found.state == "valid"
    assert found.value == {"a": 3, "b": {"c": 2}}
    assert found.duplicate_keys == ("c", "a")


def test_half_surrogates_become_writable() -> None:
    found = parse_answer('{"a\\ud800": "\\udfff x"}')
    assert found.value == {"a\ufffd": "\ufffd x"}
    json.dumps(found.value, ensure_ascii=False).encode("utf-8")


@given(JSON)
def test_valid_json_is_read_as_it_is(value: object) -> None:
    found = parse_answer(json.dumps(value))
    assert (found.state, found.value) == ("valid", value)


@given(st.text())
def test_no_text_raises(text: str) -> None:
    assert parse_answer(text).state in ("valid", "repaired", "unparsable")


def test_truths_are_never_repaired() -> None:
    assert parse_truth('{"a": 1}') == ({"a": 1}, True)
    assert parse_truth('```json\n{"a": 1}\n```') == ({"a": 1}, True)
    assert parse_truth('{"a": 1') == ('{"a": 1', False)
    assert parse_truth("42") == ("42", False)
    assert parse_truth("a plain answer") == ("a plain answer", False)
