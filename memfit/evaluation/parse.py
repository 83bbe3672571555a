"""From the text of an answer to its value, and how much help that took.

Strict JSON first. Only where that fails, json_repair has one try (code fences, prose around the object, a missing
bracket at the end of a cut answer). What it mends is scored and counted as repaired; what it cannot mend scores zero
everywhere and is counted as unparsable. Nothing is left out.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import json_repair

# A greedy decoder that repeats "[" or '{"a":' nests without end; real forms nest a few levels.
MAX_DEPTH = 32
_FENCE = re.compile(r"^```[A-Za-z]*\s*\n(.*?)\n?\s*```$", re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Parsed:
    """`value` is the JSON value, None with state unparsable; `why` says what was wrong with the text."""

    value: Any
    state: Literal["valid", "repaired", "unparsable"]
    why: str = ""
    duplicate_keys: tuple[str, ...] = ()


def parse_answer(text: str) -> Parsed:
    """Read a model's answer. A duplicate key is noted; as with Python's and JavaScript's readers its last value counts.

    Duplicates are seen in valid JSON only: json_repair does not report them.
    """
    try:
        value, duplicates = _strict(text)
        return Parsed(value, "valid", duplicate_keys=duplicates)
    except (ValueError, RecursionError) as error:
        why = _reason(error)
    if "{" not in text and "[" not in text:  # json_repair would make "" of prose
        return Parsed(None, "unparsable", why)
    try:
        value = json_repair.loads(text, skip_json_loads=True)
    except Exception as error:  # a third party's parser on arbitrary text: whatever it raises, the answer is unreadable
        return Parsed(None, "unparsable", f"{why}; repair failed: {_reason(error)}")
    if not isinstance(value, dict | list) or not value:
        return Parsed(None, "unparsable", f"{why}; repair found no content")
    if depth(value) > MAX_DEPTH:
        return Parsed(None, "unparsable", f"nested deeper than {MAX_DEPTH} levels")
    return Parsed(printable(value), "repaired", why)


def parse_truth(text: str) -> tuple[Any, bool]:
    """The value of a truth and whether it is a JSON object or array, bare or in one code fence.

    Any other truth is taken as the text that it is: repairing truths would change the test.
    """
    fenced = _FENCE.match(text.strip())
    try:
        value, _ = _strict(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return text, False
    return (value, True) if isinstance(value, dict | list) else (text, False)


def depth(value: Any) -> int:
    """Levels of objects and arrays in `value`; 0 for a plain value. Needs no recursion."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        node, level = stack.pop()
        if isinstance(node, dict | list):
            deepest = max(deepest, level)
            children = node.values() if isinstance(node, dict) else node
            stack.extend((child, level + 1) for child in children)
    return deepest


def _strict(text: str) -> tuple[Any, tuple[str, ...]]:
    """RFC 8259: no NaN, no number beyond a double, nothing around the value. Raises ValueError, RecursionError."""
    duplicates: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                duplicates.append(key)
            found[key] = value
        return found

    value = json.loads(
        text.strip().removeprefix("\ufeff"), object_pairs_hook=collect, parse_constant=_no_constant, parse_float=_finite
    )
    if depth(value) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return printable(value), tuple(duplicates)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text} is too large")
    return number


def printable(value: Any) -> Any:
    """`value` with half surrogates replaced by U+FFFD (they cannot be written as UTF-8) and infinities as text."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [printable(item) for item in value]
    if isinstance(value, dict):
        return {_SURROGATE.sub("\ufffd", str(key)): printable(item) for key, item in value.items()}
    return value


def _reason(error: BaseException) -> str:
    return str(error).split("\n", 1)[0] or type(error).__name__
