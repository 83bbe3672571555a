"""Read a recipe: YAML 1.2 and `--set key=value` through one reader, every mistake reported at once."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memfit.errors import UserError
from memfit.inputs.recipe_rules import value_mistakes
from memfit.specs.recipe import Recipe

SCHEMA_HINT = "docs/recipe.md lists every key with its values"


def load_recipe(path: Path | None, sets: Sequence[str] = (), *, model: str | None = None) -> Recipe:
    """The recipe in the file at `path` with the `key=value` texts of `sets` laid over it.

    `model` stands in for a missing recipe or replaces its model. Raises UserError that lists all mistakes.
    """
    data = read_yaml_mapping(path) if path is not None else {}
    name = path.name if path is not None else "recipe"
    for text in sets:
        key, value = parse_set(text)
        _put(data, key, value, text)
    if model is not None:
        data["model"] = model
    return recipe_from(data, name)


def override(recipe: Recipe, sets: Sequence[str] = (), model: str | None = None) -> Recipe:
    """The same recipe with the `key=value` texts of `sets`, and perhaps another model, laid over it."""
    if not sets and model is None:
        return recipe
    data = recipe.to_json()
    for text in sets:
        key, value = parse_set(text)
        _put(data, key, value, text)
    if model is not None:
        data["model"] = model
    return recipe_from(data)


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file. Raises UserError for a missing, unreadable or malformed file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}", _nearest_file_hint(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}", "give a YAML file in UTF-8") from None
    data = _parse_yaml(text, path.name)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(
            f"{path.name}: holds {_kind(data)}, not keys with values", f"begin with `model:`; {SCHEMA_HINT}"
        )
    return data


def parse_set(text: str) -> tuple[tuple[str, ...], Any]:
    """`levers.precision=pure-bf16` as (("levers", "precision"), "pure-bf16"); values are YAML 1.2 scalars."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text!r} has no key=value form", "write for example --set levers.micro_batch=2")
    return tuple(key.strip().split(".")), _parse_yaml(value, f"--set {key.strip()}") if value.strip() else None


def recipe_from(data: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """A validated Recipe from plain values. Raises UserError with every mistake, each on its own line."""
    from pydantic import ValidationError

    values = _whole_numbers(data)
    mistakes: list[str] = []
    recipe: Recipe | None = None
    try:
        # JSON mode, because strict JSON takes lists for tuples and whole numbers for floats, yet no "off" for false.
        recipe = _adapter().validate_json(json.dumps(values, default=str), strict=True)
        mistakes = value_mistakes(recipe)
    except ValidationError as error:
        wrong = _by_path(error.errors(include_url=False), values)
        mistakes = [_line(path, found) for path, found in wrong.items()]
        # The rest is judged too, so that a user mends everything in one go.
        rest = _without(values, wrong)
        with contextlib.suppress(ValidationError):
            mistakes += value_mistakes(_adapter().validate_json(json.dumps(rest, default=str), strict=True))
    if mistakes or recipe is None:
        raise _as_error(name, mistakes)
    return recipe


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, as committed in docs/recipe.schema.json."""
    schema = _adapter().json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "memfit recipe"
    return schema


@functools.cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Recipe)


def _parse_yaml(text: str, where: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    reader = YAML(typ="safe", pure=True)
    reader.version = (1, 2)
    try:
        return reader.load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        problem = " ".join(str(error.problem or error.context).split())
        raise UserError(f"{where}:{line}: not YAML: {problem}", "mend that line; indent with spaces") from None
    except (YAMLError, ValueError) as error:
        raise UserError(f"{where}: not YAML: {str(error).splitlines()[0]}", "mend the file") from None


def _put(data: dict[str, Any], key: tuple[str, ...], value: Any, text: str) -> None:
    place = data
    for name in key[:-1]:
        inner = place.get(name)
        if inner is None or inner == "auto":
            inner = {}
        if not isinstance(inner, dict):
            raise UserError(f"--set {text!r}: {name} is {_kind(inner)}, which has no keys", SCHEMA_HINT)
        # A copy, so that a mapping shared through a YAML anchor is not changed in its other places.
        inner = copy.copy(inner)
        place[name] = inner
        place = inner
    place[key[-1]] = value


def _whole_numbers(value: Any) -> Any:
    """5e8 is a float in YAML, and a whole number to whoever writes it: floats without a fraction become ints."""
    if isinstance(value, Mapping):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _by_path(errors: Sequence[Any], data: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Errors by the user's own key. pydantic reports each branch of a union apart; here they are one again."""
    found: dict[str, list[Any]] = {}
    for error in errors:
        found.setdefault(_real_path(error["loc"], data, error["type"]), []).append(error)
    # A section that is wrong only because of a key inside it is no mistake of its own.
    inner = {".".join(path.split(".")[:depth]) for path in found for depth in range(1, path.count(".") + 1)}
    return {path: wrong for path, wrong in found.items() if path not in inner}


def _without(data: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """A deep copy of `data` without the values at `paths`, and with a model, so that it can be validated."""
    rest: dict[str, Any] = copy.deepcopy(dict(data))
    for path in paths:
        place: Any = rest
        *parents, last = path.split(".")
        for name in parents:
            place = place.get(name) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(last, None)
        elif parents:
            rest.pop(parents[0], None)
    return {"model": "missing"} | rest


def _real_path(location: Iterable[Any], data: Any, kind: str) -> str:
    """The dotted key in the user's own file: pydantic adds names of union branches, which are no keys."""
    path: list[str] = []
    place = data
    steps = list(location)
    for index, step in enumerate(steps):
        is_item = isinstance(place, list | tuple) and isinstance(step, int) and step < len(place)
        if is_item or (isinstance(place, Mapping) and step in place):
            place = place[step]
        elif not (kind == "missing" and index == len(steps) - 1):
            continue
        path.append(str(step))
    return ".".join(path)


def _line(path: str, errors: Sequence[Any]) -> str:
    kinds = {error["type"] for error in errors}
    if "missing" in kinds:
        return f"{path}: is required"
    if kinds <= {"unexpected_keyword_argument", "extra_forbidden"} or (
        "unexpected_keyword_argument" in kinds and _is_key_error(path, errors)
    ):
        return f"{path}: unknown key{_suggest_key(path)}"
    wanted = list(dict.fromkeys(text for error in errors for text in _wanted(error)))
    given = next((error["input"] for error in errors if "input" in error), None)
    nearest = difflib.get_close_matches(str(given), [text.strip("'") for text in wanted], 1, 0.6)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{path}: {_shown(given)} is not allowed, expected {_either(wanted)}{hint}"


def _is_key_error(path: str, errors: Sequence[Any]) -> bool:
    last = path.rsplit(".", 1)[-1]
    return any(error["loc"][-1] == last and error["type"] == "unexpected_keyword_argument" for error in errors)


def _wanted(error: Any) -> list[str]:
    context = error.get("ctx") or {}
    if error["type"] == "literal_error":
        return [text.strip() for text in str(context["expected"]).replace(" or ", ", ").split(", ")]
    names = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "string_type": "a text",
        "bool_type": "true or false",
        "dict_type": "keys with values",
        "mapping_type": "keys with values",
        "dataclass_type": "keys with values",
        "tuple_type": "a list",
        "missing_argument": "its keys",
    }
    return [names.get(error["type"], str(error["msg"]).lower())]


def _either(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


def _suggest_key(path: str) -> str:
    """The nearest known key to an unknown one, in its own section first, then anywhere in the recipe."""
    parent, _, name = path.rpartition(".")
    known = known_keys()
    siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == parent]
    same_name = [key for key in known if key.rpartition(".")[2] == name]
    near = difflib.get_close_matches(name, siblings, 1, 0.6)
    similar = [key for key in known if difflib.get_close_matches(name, [key.rpartition(".")[2]], 1, 0.8)]
    for key in (*same_name, *(".".join(filter(None, (parent, sibling))) for sibling in near), *similar):
        return f"; did you mean {key}?"
    return f"; {parent or 'a recipe'} has {', '.join(siblings)}" if siblings else ""


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key of a recipe, sections included. Read off the schema, so that it cannot fall behind."""
    schema = recipe_schema()

    def walk(node: Mapping[str, Any], prefix: str) -> Iterable[str]:
        for option in [node, *node.get("anyOf", [])]:
            if "$ref" in option:
                option = schema["$defs"][option["$ref"].rsplit("/", 1)[-1]]
            for name, child in option.get("properties", {}).items():
                yield f"{prefix}{name}"
                yield from walk(child, f"{prefix}{name}.")

    return tuple(dict.fromkeys(walk(schema, "")))


def _as_error(name: str, mistakes: Sequence[str]) -> UserError:
    if len(mistakes) == 1:
        return UserError(f"{name}: {mistakes[0]}", SCHEMA_HINT)
    lines = "".join(f"\n  {line}" for line in mistakes)
    return UserError(f"{name}: {len(mistakes)} mistakes{lines}", f"mend all {len(mistakes)}; {SCHEMA_HINT}")


def _shown(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "keys with values"
    return "a list" if isinstance(value, list) else _shown(value)


def _nearest_file_hint(path: Path) -> str:
    folder = path.parent if str(path.parent) else Path()
    names = [entry.name for entry in folder.glob("*.y*ml")] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1, 0.5)
    if near:
        return f"did you mean {folder / near[0]}?"
    return "give the path of a YAML file, or --model NAME to go without a recipe"
