"""A recipe whose engine is a user's own DeepSpeed file: the file's content in it, and the levers that it decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memfit.catalog.deepspeed_keys import DeepSpeedKeys, shipped_keys
from memfit.errors import UserError
from memfit.inputs.deepspeed_file import read_deepspeed_file
from memfit.planner.problems import as_error
from memfit.specs.deepspeed_file import DeepSpeedCheck
from memfit.specs.hardware import Hardware
from memfit.specs.recipe import Recipe
from memfit.strategies.user_deepspeed import (
    Config,
    batches_of,
    offload_of,
    precisions_of,
    read,
    stage_of,
    zero_numbers,
)
from memfit.strategies.user_deepspeed_findings import Against, findings_of

KEY = "deepspeed"
AUTO = "auto"


def with_users_deepspeed(recipe: Recipe, hardware: Hardware) -> Recipe:
    """The recipe as it is where it names no DeepSpeed file; else with the file's content and what that decides.

    Raises UserError with every contradiction at once. Doing it again changes nothing: a run folder's plan holds the
    content, so that its ranks and a later evaluation need no file.
    """
    if KEY not in recipe.engine:
        return recipe
    check, config = _judged(recipe, hardware.ranks)
    errors = check.of("error")
    if errors:
        name = recipe.engine[KEY] if isinstance(recipe.engine[KEY], str) else f"engine.{KEY}"
        problems = [(f"{name}: {finding.key}: {finding.problem}", finding.hint) for finding in errors]
        raise as_error(problems)
    levers = {key.removeprefix("levers."): v for key, v in check.values.items() if key.startswith("levers.")}
    return dataclasses.replace(
        recipe,
        levers=dataclasses.replace(recipe.levers, **levers),
        batch=check.values.get("batch", recipe.batch),
        engine={**recipe.engine, KEY: config},
    )


def remarks(recipe: Recipe, hardware: Hardware) -> list[str]:
    """What is to be told of a recipe's DeepSpeed file beside its errors, a line each; empty without one."""
    if KEY not in recipe.engine:
        return []
    check, _ = _judged(recipe, hardware.ranks)
    words = {"no-effect": "without effect: ", "note": "", "error": ""}
    return [f"{check.file}: {words[found.kind]}{found.line}" for found in check.findings]


def check_deepspeed_file(
    file: Path, recipe: Recipe | None = None, ranks: int | None = None, keys: DeepSpeedKeys | None = None
) -> tuple[DeepSpeedCheck, dict[str, Any]]:
    """What is found in a file, by itself or against a recipe on so many ranks; and the file in one spelling."""
    if recipe is None:
        return _judge(str(file), read_deepspeed_file(file), Against(None, ranks, keys))
    engine = {**recipe.engine, KEY: str(file)}
    return _judged(dataclasses.replace(recipe, engine=engine), ranks, keys)


def _judged(
    recipe: Recipe, ranks: int | None, keys: DeepSpeedKeys | None = None
) -> tuple[DeepSpeedCheck, dict[str, Any]]:
    said = recipe.engine[KEY]
    if isinstance(said, Mapping):
        return _judge(f"engine.{KEY}", said, Against(recipe, ranks, keys))
    if not isinstance(said, str):
        raise UserError(f"engine.{KEY}: {said!r} is no file", "engine: {deepspeed: ds_config.json}")
    return _judge(said, read_deepspeed_file(Path(said).expanduser()), Against(recipe, ranks, keys))


def _judge(name: str, content: Config, against: Against) -> tuple[DeepSpeedCheck, dict[str, Any]]:
    made = read(content, against.keys)
    findings = (*made.findings, *findings_of(made.config, against))
    wrong = any(finding.kind == "error" for finding in findings)
    check = DeepSpeedCheck(
        file=name,
        findings=findings,
        values={} if wrong else _decided(made.config, against),
        zero={} if wrong else zero_numbers(made.config),
        keys=(against.keys or shipped_keys()).version,
    )
    return check, made.config


def _decided(config: Config, against: Against) -> dict[str, Any]:
    """Dotted recipe keys that the file decides."""
    recipe = against.recipe
    values: dict[str, Any] = {"levers.parallel": f"zero{stage_of(config)}"}
    values |= {f"levers.{key}": value for key, value in offload_of(config).items()}
    allowed = precisions_of(config)
    pinned = AUTO if recipe is None else recipe.levers.precision
    if pinned == AUTO:
        # Nothing said is fp32 to DeepSpeed; "auto" leaves it to the recipe, and a recipe's "auto" prefers 16 bit.
        open_to_all = {"bf16-mixed", "fp16-mixed"} <= set(allowed)
        if not open_to_all:
            values["levers.precision"] = allowed[0] if allowed else "fp32"
    if against.ranks is not None:
        values |= batches_of(config, against.ranks, AUTO if recipe is None else recipe.levers.micro_batch)
    return values
