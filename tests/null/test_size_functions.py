"""Exact functions of rows and tokens: found where they exist, refused where they do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from memfit.physics.size_functions import MONOMIALS, evaluate, fit, values_of
from memfit.specs.tape import SizeTerm

SIZES = [(3, 2733), (4, 2640), (5, 2555), (3, 3990), (6, 5131), (1, 2401), (2, 3333)]
ELSEWHERE = [(7, 4099), (1, 129), (2, 8192)]
POINTS = [values_of(*size) for size in SIZES]


def up(tokens: int, step: int) -> int:
    return -(-tokens // step) * step


FORMS: dict[str, Callable[[int, int], int]] = {
    "hidden states": lambda b, t: b * t * 4096 * 2,
    "shifted logits": lambda b, t: 4 * b * (t - 1) * 128256,
    "logsumexp of a kernel that works in 32": lambda b, t: 4 * b * 32 * up(t, 32),
    "a padded mask": lambda b, t: 2 * t * up(t, 8),
    "chunked linear attention": lambda b, t: b * up(t, 64) // 64 * 16 * 64 * 64 * 4,
    "scores": lambda b, t: 2 * b * 28 * t * t,
    "text and pictures": lambda b, t: 7168 * b * t + 98560,
    "the last chunk of a loss": lambda b, t: (b * t - 512 * (-(-b * t // 512) - 1)) * 8192,
    "a table": lambda b, t: 8388608,
    "nothing": lambda b, t: 0,
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_found_and_holds_elsewhere(name: str) -> None:
    form = FORMS[name]
    function = fit(POINTS, [form(*size) for size in SIZES])
    assert function is not None
    for size in ELSEWHERE:
        assert evaluate(function, values_of(*size)) == form(*size), size


@pytest.mark.parametrize(
    "form",
    [lambda b, t: b * b * t, lambda b, t: up(t, 48) * b, lambda b, t: 3 * t**3 + b, lambda b, t: b * t + t % 7],
    ids=["rows squared", "another rounding", "a cube", "a remainder"],
)
def test_what_is_no_form_gets_none(form: Callable[[int, int], int]) -> None:
    assert fit(POINTS, [form(*size) for size in SIZES]) is None


def test_one_byte_off_is_no_form() -> None:
    sizes = [FORMS["hidden states"](*size) for size in SIZES]
    sizes[3] += 1
    assert fit(POINTS, sizes) is None


def test_too_few_points_give_no_function() -> None:
    assert fit(POINTS[:1], [5]) is None


def test_monomials_by_hand() -> None:
    point = values_of(2, 100)
    expected = {"T": 100, "T-1": 99, "T64": 128, "B*T*T8": 2 * 100 * 104, "BT512": 1, "BT-1_512": 1, "B*1": 2}
    assert {name: point[name] for name in expected} == expected
    assert set(point) >= set(MONOMIALS)


def test_a_fraction_is_no_size() -> None:
    with pytest.raises(ValueError, match="gives"):
        evaluate((SizeTerm(1, 3, "T"),), values_of(1, 100))
