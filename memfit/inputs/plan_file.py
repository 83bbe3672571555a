"""plan.json read back: the recipe of what was chosen, every lever with its value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memfit.errors import UserError
from memfit.inputs.recipe_file import recipe_from
from memfit.specs.recipe import Recipe


def is_plan_file(path: Path) -> bool:
    """Whether a path is meant as a plan: recipes are YAML."""
    return path.suffix == ".json"


def recipe_of_plan(path: Path) -> Recipe:
    """The recipe of a plan that `memfit plan` or a run wrote. UserError for a file that is none, or chose nothing."""
    data = read_plan_file(path)
    if "chosen" in data:
        data = data["chosen"]
        if data is None:
            raise UserError(f"{path} holds a search that found nothing that fits", "memfit plan says what would help")
    if not isinstance(data, dict) or not isinstance(data.get("recipe"), dict):
        raise UserError(f"{path} is no plan: it holds no recipe", "give a recipe (YAML), or what memfit plan wrote")
    return recipe_from(data["recipe"], path.name)


def may_write_plan(path: Path) -> None:
    """Raises UserError where a file of this name is there and is no answer of `memfit plan`."""
    if path.exists() and "searched" not in read_plan_file(path):
        raise UserError(f"{path} is there and was not written by memfit plan", "name another file with --out")


def read_plan_file(path: Path) -> dict[str, Any]:
    """The object in a plan.json, {} for another one. UserError for a file that cannot be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}", "give a recipe (YAML), or what memfit plan wrote") from None
    return data if isinstance(data, dict) else {}
