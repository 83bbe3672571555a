"""The line that is shown while a step is traced."""

from __future__ import annotations

import io
import time

import pytest

from memfit.monitor.waiting import waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_it_tells_what_and_how_long_and_leaves_nothing() -> None:
    stream = Terminal()
    with waiting(stream, "tracing a model", patience=0.01):
        time.sleep(0.1)
    text = stream.getvalue()
    assert text.startswith("\r  tracing a model ... 0 s")
    assert text.endswith("\r")
    assert text.split("\r")[-2].strip() == ""


def test_a_fast_answer_is_not_announced() -> None:
    stream = Terminal()
    with waiting(stream, "tracing", patience=5):
        pass
    assert stream.getvalue() == ""


def test_no_terminal_no_word() -> None:
    stream = io.StringIO()
    with waiting(stream, "tracing", patience=0):
        time.sleep(0.02)
    assert stream.getvalue() == ""


def test_an_error_goes_through_and_the_line_is_wiped() -> None:
    stream = Terminal()

    def fails() -> None:
        with waiting(stream, "tracing", patience=0.01):
            time.sleep(0.05)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fails()
    assert stream.getvalue().endswith("\r")
