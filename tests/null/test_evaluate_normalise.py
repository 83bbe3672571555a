"""Which texts count as the same value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.evaluation.normalise import agree, canonical, clean_text, is_empty

SAME = [
    ("48.50", 48.5),
    ("48.50", "48.5"),
    ("1,234.50", "1234.5"),
    ("1.234,50", "1234.50"),
    ("1 234,50", 1234.5),
    ("1'234.50", "1,234.50"),
    ("12,34,567", "1234567"),  # Indian grouping
    ("48,50", "48.5"),  # two digits after the comma: no thousand
    ("0,125", 0.125),
    ("1234,567", "1234.567"),  # four digits before the comma: no thousand
    ("１２．５", "12.5"),
    ("−5", -5),  # U+2212
    ("+5", 5),
    (1e3, "1000"),
    (5, 5.0),
    ("$48.50", 48.5),
    ("$48.50", "USD 48.5"),
    ("-$5.00", "$-5"),
    ("100元", "￥100"),
    ("RM 5.00", "5"),
    ("5%", "5.0 %"),
    ("2024-03-05", "2024/3/5"),
    ("2024-03-05", "2024.03.05"),
    ("2024-03-05", "2024年3月5日"),
    ("2024-03-05", "2024 年 3 月 5 日"),
    ("2024-03-05", "5 March 2024"),
    ("2024-03-05", "March 5th, 2024"),
    ("2024-03-05", "05-Mar-2024"),
    ("2024-03-25", "25/03/2024"),
    ("2024-03-25", "03/25/2024"),
    ("2024-05-05", "05/05/2024"),  # both readings are the same day
    ("05/03/2024", "5.3.2024"),  # the same three numbers in the same order
    ("2024-03-05 7:30", "2024-03-05T07:30:00"),
    ("ＡＢＣ", "ABC"),
    ("Tea  House", " Tea House "),
    ("北京 市", "北京市"),
    ("北京市 100 号", "北京市100号"),
    ("it’s", "it's"),
    ("a – b", "a - b"),
    (True, "true"),
    ("TRUE", True),
]
DIFFERENT = [
    ("ABC", "abc"),
    ("007", "7"),
    ("0042", 42),
    ("5%", "5"),
    ("5%", "0.05"),
    ("$5", "€5"),
    ("1,234", "1.234"),  # a thousand, and a bit more than one
    ("1E5", "100000"),  # a code, not a number
    ("05/03/2024", "2024-03-05"),  # March or May: not guessed
    ("05/03/2024", "03/05/2024"),
    ("25/03/24", "2024-03-25"),  # the year might be 25
    ("2024-02-30", "2024-03-01"),  # no such day
    ("2024-03-05", "20240305"),
    ("2024-03-05 07:30", "2024-03-05"),
    ("05-03", "5-3"),  # no full date
    ("12:30", "12.30"),
    (True, 1),
    ("yes", True),
    ("1,23", "123"),
    ("12 34", "1234"),
    ("Tea House", "TeaHouse"),
]


@pytest.mark.parametrize(("a", "b"), SAME, ids=repr)
def test_same_after_normalisation(a: object, b: object) -> None:
    assert agree(a, b, "normalised")
    assert agree(b, a, "normalised")


@pytest.mark.parametrize(("a", "b"), DIFFERENT, ids=repr)
def test_different_after_normalisation(a: object, b: object) -> None:
    assert not agree(a, b, "normalised")
    assert not agree(b, a, "normalised")


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (48.5, 48.50, True),
        (5, 5.0, True),
        ("48.50", 48.5, False),
        (True, 1, False),
        (1, True, False),
        ("a", "a ", False),
    ],
)
def test_strictly(a: object, b: object, same: bool) -> None:
    assert agree(a, b, "strict") is same


@pytest.mark.parametrize(
    ("value", "strict", "normalised"),
    [
        (None, True, True),
        ("", True, True),
        (" \n", True, True),
        ("\u3000", True, True),
        ({}, True, True),
        ([], True, True),
        ("null", False, True),
        ("None", False, True),
        ("N/A", False, True),
        ("-", False, False),
        (0, False, False),
        (False, False, False),
        ([None], False, False),
    ],
)
def test_empty(value: object, strict: bool, normalised: bool) -> None:
    assert is_empty(value, "strict") is strict
    assert is_empty(value, "normalised") is normalised


def test_a_number_keeps_all_its_digits() -> None:
    """Going through a float would make these two the same."""
    assert not agree("12345678901234567890", "12345678901234567891", "normalised")
    assert canonical("0.10").text == "0.1"
    assert canonical(1e22).text == "1" + 22 * "0"


@given(st.text())
def test_cleaning_twice_changes_nothing_more(text: str) -> None:
    once = clean_text(text)
    assert clean_text(once) == once


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=2))
def test_grouped_and_plain_numbers_agree(number: object) -> None:
    assert agree(f"{number:,.2f}", f"{number:.2f}", "normalised")
    assert agree(f"{number:.2f}", float(number), "normalised")


@given(st.dates())
def test_unambiguous_date_formats_agree(date: object) -> None:
    texts = [f"{date:%d} {date:%B} {date.year:04d}", f"{date.year:04d}年{date.month}月{date.day}日"]
    for text in texts:
        assert agree(date.isoformat(), text, "normalised"), text


@given(st.one_of(st.text(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans()))
def test_every_value_agrees_with_itself(value: object) -> None:
    for view in ("strict", "normalised"):
        assert agree(value, value, view)
