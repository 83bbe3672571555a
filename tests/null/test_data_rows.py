"""Reading rows: lists and JSONL, line numbers, and what is said of files that are no JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.errors import UserError
from memfit.inputs.data.rows import read_rows


def write(folder: Path, content: str | bytes, name: str = "data.json") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    return caught.value


def test_list_with_lines(tmp_path: Path) -> None:
    path = write(tmp_path, '\n[\n  {"a": 1},\n\n  {"a":\n 2}, {"a": 3}\n]\n')
    assert [(row.number, row.line, row.value["a"]) for row in read_rows(path)] == [(0, 3, 1), (1, 5, 2), (2, 6, 3)]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("jsonl", [False, True])
def test_byte_order_mark(tmp_path: Path, mark: bytes, jsonl: bool) -> None:
    row = json.dumps({"a": "票"}, ensure_ascii=False).encode()
    path = write(tmp_path, mark + (row + b"\r\n" + row if jsonl else b"[" + row + b"," + row + b"]"))
    assert [row.value for row in read_rows(path)] == [{"a": "票"}, {"a": "票"}]


def test_jsonl_counts_rows_and_lines_apart(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": 1}\n\n{"a": 2\n{"a": 3}\n')
    first, bad, last = read_rows(path)
    assert (first.number, first.line, last.number, last.line) == (0, 1, 2, 4)
    assert (bad.number, bad.line, bad.text) == (1, 3, '{"a": 2')
    assert bad.problem is not None
    assert "not JSON" in bad.problem


def test_jsonl_bad_first_line_is_one_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": \n{"a": 2}\n')
    assert [row.problem is None for row in read_rows(path)] == [False, True]


def test_jsonl_line_that_is_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"a": 1}\n{"a": "\xc6\xb1\xbe\xdd"}\n{"a": 3}\n')
    rows = list(read_rows(path))
    assert [row.problem is None for row in rows] == [True, False, True]
    assert "UTF-8" in str(rows[1].problem)


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        ('[\n{"a": 1},\n{"a" 2}\n]', 3, "Expecting ':'"),
        ('[\n{"a": 1}\n{"a": 2}\n]', 3, "Expecting ','"),
        ('[\n{"a": 1},\n]', 3, "comma before the closing"),
        ('[\n{"a": 1},\n{"a": 2}', 3, "ends in the middle"),
        ('[\n{"a": "x', 2, "Invalid control character|Unterminated"),
        ('[{"a": 1}]\n\n{"a": 2}', 3, "after the end"),
        ("{\n'a': 1,\n'b': 2,\n'c': 3\n}", 1, "not JSON"),
        ('[\n{"a": ' + "[" * 100_000, 2, "too deeply"),
        ('[\n{"a": ' + "1" * 5000 + "}]", 2, "4300"),
    ],
)
def test_syntax_errors_name_the_line(tmp_path: Path, content: str, line: int, said: str) -> None:
    import re

    error = refused(write(tmp_path, content))
    assert f"data.json line {line}" in error.problem
    assert re.search(said, error.problem)
    assert "\n" not in error.problem


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"[]", "no rows"),
        (b"PAR1\x00", "neither JSON nor JSONL"),
        ("[1]".encode("utf-16"), "UTF-16"),
        (b'[\n{"a": "\xc6\xb1\xbe\xdd"}]', "line 2: not UTF-8"),
    ],
)
def test_files_that_hold_no_rows(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in refused(write(tmp_path, content)).problem


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.json").problem
    assert "folder" in refused(tmp_path).problem
    assert "not a path" in refused(tmp_path / "a\0b").problem


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=5), st.sampled_from([None, 1])
)
def test_any_rows_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict], indent: int | None) -> None:
    folder = tmp_path_factory.mktemp("rows")
    as_list = write(folder, json.dumps(rows, indent=indent), "list.json")
    as_lines = write(folder, "\n".join(json.dumps(row) for row in rows), "lines.jsonl")
    assert [row.value for row in read_rows(as_list)] == rows
    assert [row.value for row in read_rows(as_lines)] == rows
