"""Sizes: GiB and GB are told apart, bytes are whole."""

from __future__ import annotations

import pytest

from memfit.units import count_text, gib, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("128GiB", 128 * 2**30),
        ("128 GB", 128 * 10**9),
        ("24G", 24 * 2**30),
        ("1.5TiB", 3 * 2**39),
        ("512", 512),
        (4096, 4096),
        ("1e3", 1000),
    ],
)
def test_sizes_are_read_as_written(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["lots", "12XB", "", "GiB", -1])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match=r"size"):
        parse_bytes(text)


def test_texts() -> None:
    assert gib(25_436_684_288) == "23.69 GiB"
    assert gib(3 * 2**20) == "3.00 MiB"
    assert count_text(8_099_175_664) == "8.1 B"
    assert count_text(1234) == "1,234"
