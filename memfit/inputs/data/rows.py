"""From a data file to its rows: a JSON list, or one JSON object a line. No row is interpreted here.

A list is one JSON text, so a syntax error in it is a `UserError` with the line. In a JSONL file every line stands
alone: a bad line becomes a row with `problem` set, and the others are read on.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from memfit.errors import UserError

_SPACE = re.compile(r"[ \t\r\n]*")
_HINT = "a data file is a JSON list of rows, or JSONL with one JSON object a line, in UTF-8"
# So many lines at the top of a JSONL file that are all unreadable mean that the file is no JSONL at all.
_HOPELESS = 3


@dataclass(frozen=True)
class Row:
    """One row. `number` counts from 0, `line` (where it begins) from 1. A bad line has `problem` and its raw `text`."""

    number: int
    line: int
    value: Any = None
    problem: str | None = None
    text: str | None = None


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of `path` in order. JSONL is read line by line; a list is held as text, its rows are made one by one.

    Raises UserError when the file is missing, empty, not UTF-8, or not JSON.
    """
    with _open(path) as file:
        first = _first_character(path, file)
        yield from (_list_rows(path, file.read()) if first == "[" else _line_rows(path, file))


def _open(path: Path) -> BinaryIO:
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, not a data file", "name the JSON or JSONL file itself")
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot read the data file ({error.strerror})", "check the path") from error
    except ValueError as error:  # a NUL byte
        raise UserError(f"{str(path)!r}: not a path ({error})", "check the path") from error


def _first_character(path: Path, file: BinaryIO) -> str:
    """Look at the first character that is not white space; leaves `file` behind a byte order mark."""
    head = file.read(4096)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}: is UTF-16, not UTF-8", "save the file as UTF-8")
    mark = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    start = head[mark:].lstrip()
    file.seek(mark)
    if not start:
        raise UserError(f"{path}: the data file is empty", _HINT)
    if start[:1] not in (b"[", b"{"):
        shown = start[:12].decode("latin-1")
        raise UserError(f"{path}: is neither JSON nor JSONL (it begins with {shown!r})", _HINT)
    return start[:1].decode("ascii")


def _list_rows(path: Path, raw: bytes) -> Iterator[Row]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line}: not UTF-8 text ({error.reason})", "save the file as UTF-8") from error
    decoder = json.JSONDecoder()
    at = _skip(text, _skip(text, 0) + 1)  # behind the bracket
    number, line, counted = 0, 1, 0
    while not text.startswith("]", at):
        line += text.count("\n", counted, at)
        counted = at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _syntax_error(path, text, error.pos, error.msg) from error
        except RecursionError as error:
            raise _syntax_error(path, text, at, "nested too deeply") from error
        except ValueError as error:  # Python reads no integer of more than 4300 digits
            raise _syntax_error(path, text, at, str(error)) from error
        yield Row(number, line, value)
        number += 1
        at = _skip(text, end)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
            if text.startswith("]", at):
                raise _syntax_error(path, text, at, "a comma before the closing bracket")
        elif not text.startswith("]", at):
            raise _syntax_error(path, text, at, "Expecting ',' between two rows or ']' after the last")
    after = _skip(text, at + 1)
    if after < len(text):
        raise _syntax_error(path, text, after, "text after the end of the list")
    if number == 0:
        raise UserError(f"{path}: the list has no rows", _HINT)


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _syntax_error(path: Path, text: str, at: int, message: str) -> UserError:
    line = text.count("\n", 0, at) + 1
    column = at - text.rfind("\n", 0, at)
    if at >= len(text):
        problem = f"{path} line {line}: the file ends in the middle of the list ({message})"
        return UserError(problem, "was the file copied or downloaded in full? it must end with ]")
    return UserError(f"{path} line {line}, column {column}: not JSON ({message})", f"mend that line; {_HINT}")


def _line_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    number = 0
    held: list[Row] = []  # bad lines at the very top, until a good one shows that this is JSONL
    hopeful = False
    for line, raw in enumerate(file, start=1):
        if not raw.strip():
            continue
        row = _line_row(number, line, raw)
        number += 1
        if row.problem is None:
            hopeful = True
        if hopeful:
            yield from held
            held.clear()
            yield row
            continue
        held.append(row)
        if len(held) == _HOPELESS:
            raise _no_jsonl(path, held[0])
    if held:
        raise _no_jsonl(path, held[0])


def _line_row(number: int, line: int, raw: bytes) -> Row:
    try:
        return Row(number, line, json.loads(raw.decode("utf-8")))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text ({error.reason}); save the file as UTF-8"
    except json.JSONDecodeError as error:
        problem = f"not JSON: {error.msg}, column {error.colno}"
    except RecursionError:
        problem = "not JSON: nested too deeply"
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        problem = f"not JSON: {error}"
    return Row(number, line, problem=problem, text=raw.decode("utf-8", errors="replace").rstrip("\r\n"))


def _no_jsonl(path: Path, first: Row) -> UserError:
    return UserError(f"{path} line {first.line}: {first.problem}", _HINT)
