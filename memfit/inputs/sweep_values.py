"""`--sweep KEY=a..b`, `KEY=a..b..step`, `KEY=a,b,c`: the key and the values it takes, in order."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

from memfit.errors import UserError
from memfit.inputs.recipe_file import known_keys, parse_set, recipe_schema

FORM = "write for example --sweep workload.tokens=1024..8192, levers.micro_batch=1..8..1 or image.max_slices=1,4,9"
FREE = ("model_config", "engine")  # sections whose keys are not memfit's own
SIZE_KEY = "workload.image_size"
FEW, MOST = 9, 64  # values that a range without a step gives at most; values of one sweep
_SIZE = re.compile(r"^(\d+)x(\d+)$")


def parse_sweep(text: str) -> tuple[str, tuple[Any, ...]]:
    """The dotted key and its values, in order, each once. UserError for what cannot be read, and for unknown keys."""
    key, equals, said = text.partition("=")
    key, said = key.strip(), said.strip()
    if not equals or not key or not said:
        raise UserError(f"--sweep {text!r} has no KEY=a..b form", FORM)
    _check_key(key)
    if ".." not in said:
        values = [parse_set(f"{key}={piece}")[1] for piece in said.split(",") if piece.strip()]
    elif key == SIZE_KEY:
        values = _sizes(said.split(".."))
    else:
        if not _takes_numbers(key):
            raise UserError(
                f"--sweep {key}={said}: {key} takes no numbers, so that it has no range",
                f"list its values: --sweep {key}=a,b,c; docs/recipe.md has them",
            )
        values = _range([_number(piece, key) for piece in said.split("..")], said)
    values = list(dict.fromkeys(values))
    if len(values) > MOST:
        raise UserError(f"--sweep {key}={said} has {len(values)} values, at most {MOST} are drawn", "take a wider step")
    if not values:
        raise UserError(f"--sweep {text!r} names no value", FORM)
    return key, tuple(values)


def _check_key(key: str) -> None:
    section = key.partition(".")[0]
    known = known_keys()
    if section in FREE and "." in key:
        return
    inner = [name for name in known if name.startswith(f"{key}.")]
    if inner or key in FREE:
        first = inner[0] if inner else f"{key}.NAME"
        raise UserError(f"--sweep {key}: is a section, not one value", f"sweep a key of it, as {first}")
    if key not in known and section not in ("parts",):
        near = difflib.get_close_matches(key, known, 1, 0.5)
        last = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        found = (last or near or [""])[0]
        raise UserError(
            f"--sweep {key}: unknown key", f"did you mean {found}?" if found else "docs/recipe.md lists every key"
        )


def _takes_numbers(key: str) -> bool:
    """Whether the recipe's types let this key be a number."""
    schema = recipe_schema()
    nodes: list[Mapping[str, Any]] = [schema]
    for name in key.split("."):
        nodes = [node for one in nodes for node in _options(one, schema)]
        nodes = [one["properties"][name] for one in nodes if name in one.get("properties", {})]
        if not nodes:
            return key.partition(".")[0] in FREE
    return any(one.get("type") in ("integer", "number") for node in nodes for one in _options(node, schema))


def _options(node: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for option in node.get("anyOf", [node]):
        found.append(schema["$defs"][option["$ref"].rsplit("/", 1)[-1]] if "$ref" in option else option)
    return found


def _number(piece: str, key: str) -> float:
    text = piece.strip()
    value = parse_set(f"{key}={text}")[1] if text else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        shown = repr(text) if text else "nothing"
        raise UserError(f"--sweep {key}: {shown} is no number, and a range goes from one number to another", FORM)
    return value


def _range(ends: list[float], said: str) -> list[float]:
    if len(ends) not in (2, 3):
        raise UserError(f"--sweep: {said!r} is no range a..b or a..b..step", FORM)
    first, last = ends[:2]
    if first > last:
        raise UserError(f"--sweep: {said} runs backwards", f"{_text(last)}..{_text(first)}")
    whole = all(float(end).is_integer() for end in ends)
    if len(ends) == 3:
        step = ends[2]
        if step <= 0:
            raise UserError(f"--sweep: {said} has a step of {_text(step)}", "a step above 0")
    else:
        step = _step(int(first), int(last)) if whole else (last - first) / (FEW - 1)
    if not whole or step:
        count = math.floor((last - first) / step + 1e-9) + 1 if step else 1
        if count > MOST:
            least = math.ceil((last - first) / (MOST - 1)) if whole else (last - first) / (MOST - 1)
            problem = f"--sweep: {said} has {count:,} values, at most {MOST} are drawn"
            raise UserError(problem, f"a step of {_text(least)} or more")
        found = [first + step * place for place in range(count)]
    else:
        found = _doubling(int(first), int(last))
    if found[-1] < last and len(ends) == 2:
        found.append(last)
    return [int(value) for value in found] if whole else [round(value, 12) for value in found]


def _step(first: int, last: int) -> int:
    """A step that gives 5 to 9 round values; 0 where doubling says more: over a factor of 8 and beyond."""
    span = last - first
    if span < FEW:
        return 1
    if first > 0 and last >= 8 * first:
        return 0
    step = math.gcd(first, last)
    while step % 2 == 0 and span // step < 4:
        step //= 2
    return step * math.ceil(span / (step * (FEW - 1)))


def _doubling(first: int, last: int) -> list[float]:
    found = [float(first)]
    factor = 2 if last / first <= 2 ** (FEW - 1) else 4
    while found[-1] * factor <= last:
        found.append(found[-1] * factor)
    return found


def _sizes(pieces: list[str]) -> list[str]:
    """Sizes of pictures from one to another, both sides in step."""
    found = [_SIZE.match(piece.strip()) for piece in pieces[:2]]
    step = re.match(r"^(\d+)(?:x(\d+))?$", pieces[2].strip()) if len(pieces) == 3 else None
    if len(pieces) not in (2, 3) or not all(found) or (len(pieces) == 3 and step is None):
        raise UserError(
            f"--sweep {SIZE_KEY}={'..'.join(pieces)} is no range of sizes", f"--sweep {SIZE_KEY}=448x448..1344x1344"
        )
    sides = []
    for side in (1, 2):
        ends = [float(match[side]) for match in found if match]
        if step is not None:
            ends.append(float(step[2] or step[1]) if side == 2 else float(step[1]))
        said = "..".join(_text(end) for end in ends)
        sides.append(_range(ends, said) if ends[0] != ends[1] else [ends[0]])
    count = max(map(len, sides))
    if any(len(side) not in (1, count) for side in sides):
        raise UserError(
            f"--sweep {SIZE_KEY}={'..'.join(pieces)}: width and height do not take the same number of steps",
            f"--sweep {SIZE_KEY}=448x448..1344x1344",
        )
    widths, heights = (side if len(side) == count else side * count for side in sides)
    return [f"{int(width)}x{int(height)}" for width, height in zip(widths, heights, strict=True)]


def _text(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:g}"
