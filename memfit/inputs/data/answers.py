"""What the answers hold: JSON or not, and how each JSON field is filled."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from memfit.inputs.data.draft import kind
from memfit.specs.check import FieldStats

_MOST_FIELDS = 200  # fields in the table; answers keyed by data (names, dates) would have one a row
_MOST_VALUES = 10_000  # different values remembered of one field
_SHOWN = 60  # characters of a value
_EMPTY: tuple[Any, ...] = (None, "", [], {})


def parse_answer(text: str) -> Any:
    """The answer as JSON when it is an object or a list, else None: a bare number or word is text."""
    stripped = text.strip()
    if not stripped or stripped[0] not in "{[":
        return None
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


@dataclass
class _Tally:
    owner: str
    filled: int = 0
    values: Counter[str] = field(default_factory=Counter)
    capped: bool = False
    types: Counter[str] = field(default_factory=Counter)

    def add(self, value: Any) -> None:
        if any(value == empty and type(value) is type(empty) for empty in _EMPTY):
            return
        self.filled += 1
        self.types[kind(value)] += 1
        text = _short(json.dumps(value, ensure_ascii=False, sort_keys=True))
        if text in self.values or len(self.values) < _MOST_VALUES:
            self.values[text] += 1
        else:
            self.capped = True


def field_table(answers: Iterable[Any]) -> tuple[tuple[FieldStats, ...], int]:
    """Statistics of every field of the parsed `answers`, the most often filled first, and how many fields were left
    out.

    A field is possible wherever the object that it belongs to stands: an answer for a field at the top, one element
    of the list for `items[].price`.
    """
    tallies: dict[str, _Tally] = {}
    owners: Counter[str] = Counter()
    left_out: set[str] = set()
    for answer in answers:
        for owner, path, value in _fields(answer, ""):
            if path is None:
                owners[owner] += 1
            elif path in tallies or len(tallies) < _MOST_FIELDS:
                tallies.setdefault(path, _Tally(owner)).add(value)
            elif len(left_out) < _MOST_VALUES:
                left_out.add(path)
    stats = [_stats(path, tally, owners[tally.owner]) for path, tally in tallies.items()]
    return tuple(sorted(stats, key=lambda one: (-one.filled, one.path))), len(left_out)


def _short(text: str) -> str:
    """`text`, or its beginning and a hash: long values are told apart without being kept."""
    if len(text) <= _SHOWN:
        return text
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{text[:_SHOWN]}...{digest}"


def _fields(value: Any, owner: str) -> Iterator[tuple[str, str | None, Any]]:
    """(owner, None, ...) for every object met, and (owner, path, value) for each of its fields, depth first."""
    if isinstance(value, list):
        for element in value:
            if isinstance(element, dict | list):
                yield from _fields(element, f"{owner}[]")
    elif isinstance(value, dict):
        yield owner, None, None
        for name, inner in value.items():
            path = f"{owner}.{name}" if owner else str(name)
            yield owner, path, inner
            yield from _fields(inner, path)


def _stats(path: str, tally: _Tally, possible: int) -> FieldStats:
    top = tally.values.most_common(1)
    return FieldStats(
        path=path,
        possible=possible,
        filled=tally.filled,
        distinct=len(tally.values),
        distinct_capped=tally.capped,
        top_value=top[0][0][: _SHOWN + 3] if top else "",
        top_count=top[0][1] if top else 0,
        types=dict(tally.types.most_common()),
    )
