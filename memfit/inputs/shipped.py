"""Traced numbers that come with memfit: parameters and default steps of catalogued models, by their cache keys.

A key holds the config, the levers and the versions of torch and transformers that traced, so that data of another
version are not found and the numbers are traced here. Written by tools/catalog_data.py.
"""

from __future__ import annotations

import gzip
import json
from importlib import resources
from itertools import accumulate, pairwise
from typing import Any

# Tables of a trace with thousands of rows: kept column by column, whole numbers as steps from row to row, which takes a
# third of the room after packing.
TABLES = ("stretches", "timeline")


def shipped(kind: str, key: str) -> dict[str, Any] | None:
    """The shipped value of a key, or None. `kind`: profiles, traces or replays."""
    file = resources.files("memfit") / "catalog" / "data" / kind / f"{key}.json.gz"
    try:
        value = json.loads(gzip.decompress(file.read_bytes()))
    except (OSError, ValueError, EOFError):
        return None
    return _with_tables(value, _rows) if isinstance(value, dict) else None


def packed(value: dict[str, Any]) -> bytes:
    """What `shipped` reads. The same value gives the same bytes: no time of writing is kept."""
    text = json.dumps(_with_tables(value, _columns), separators=(",", ":"))
    return gzip.compress(text.encode(), mtime=0)


def _with_tables(value: dict[str, Any], change: Any) -> dict[str, Any]:
    trace = value.get("trace")
    if not isinstance(trace, dict):
        return value
    return {**value, "trace": {**trace, **{name: change(trace[name]) for name in TABLES if name in trace}}}


def _columns(rows: list[list[Any]]) -> list[list[Any]]:
    return [_steps(list(column)) for column in zip(*rows, strict=True)]


def _rows(columns: list[list[Any]]) -> list[list[Any]]:
    return [list(row) for row in zip(*map(_sums, columns), strict=True)]


def _whole(column: list[Any]) -> bool:
    return all(isinstance(value, int) for value in column)


def _steps(column: list[Any]) -> list[Any]:
    return [*column[:1], *(after - before for before, after in pairwise(column))] if _whole(column) else column


def _sums(column: list[Any]) -> list[Any]:
    return list(accumulate(column)) if _whole(column) else column
