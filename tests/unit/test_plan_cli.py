"""`memfit plan` as a user meets it, on tiny models: the answer, plan.json, exit codes, and what train makes of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import memfit
from memfit.inputs.plan_file import recipe_of_plan
from memfit.specs.recipe import Recipe
from memfit.trace.forecast import step_request
from memfit.trace.prepare import prepare
from memfit.trace.step import trace_step
from tests.unit.conftest import Command


@pytest.fixture
def tiny(dummies: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model on one card; steps are traced here and kept in a cache of its own."""
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.yaml"
    path.write_text(f"model: {dummies('llama')}\nworkload: {{tokens: 64}}\nbatch: 2\nhardware: {{gpus: 1xRTX4090}}\n")
    return path


def test_the_answer_and_its_file(run: Command, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    code, text, progress = run("plan", tiny, "--brief", "--out", out)
    assert code == 0
    assert "fits: full, none, bf16-amp, checkpointing none" in text
    assert "the fastest that fits in tier 1" in text
    assert "tracing a step" in progress
    found = json.loads(out.read_text())
    contract = {"chosen", "ranked", "refused", "nearest", "searched", "seconds", "offers", "answers"}
    assert set(found) == contract | {"candidates"}
    assert found["chosen"] == found["ranked"][0]
    assert found["chosen"]["tier"] == 1
    assert "auto" not in found["chosen"]["recipe"]["levers"].values()
    code, again, progress = run("plan", tiny, "--brief", "--out", out, "--json")
    assert (code, "tracing a step" in progress) == (0, False), "traced steps are kept"
    assert json.loads(again)["chosen"] == found["chosen"]
    assert set(json.loads(again)) == contract


def test_a_plan_is_what_estimate_says_of_it(run: Command, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    run("plan", tiny, "--brief", "--out", out)
    chosen = json.loads(out.read_text())["chosen"]["forecast"]
    _, text, _ = run("estimate", out, "--json")
    alone = json.loads(text)
    for key in ("gpu", "host", "speed", "verdict"):
        assert alone[key] == chosen[key], key


def test_speed_is_told_where_rates_are_known(run: Command, tiny: Path) -> None:
    speed = json.loads(run("estimate", tiny, "--json")[1])["speed"]
    assert speed["low_seconds"] <= speed["step_seconds"] <= speed["high_seconds"]
    assert speed["tokens_per_second"] == pytest.approx(2 * 64 / speed["step_seconds"])
    assert "speed: " in run("estimate", tiny)[1]
    assert json.loads(run("estimate", tiny, "--gpus", "1xcpu", "--json")[1])["speed"] is None


def test_what_does_not_fit_ends_with_three_and_says_what_would(run: Command, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    code, text, _ = run("plan", tiny, "--brief", "--gpus", "1xcpu", "--host-memory", "400MiB", "--out", out)
    assert code == 3
    assert text.startswith("does not fit: the closest needs")
    found = json.loads(out.read_text())
    assert found["chosen"] is None
    assert found["refused"][0]["short_by_bytes"] > 0
    sets = [f"{key}={value}" for key, value in found["refused"][0]["levers"].items()]
    arguments = [piece for text in sets for piece in ("--set", text)]
    code, text, _ = run("estimate", tiny, "--gpus", "1xcpu", "--host-memory", "400MiB", *arguments, "--json")
    assert (code, json.loads(text)["host"]["short_by_bytes"]) == (3, found["refused"][0]["short_by_bytes"])
    assert any("of host memory" in one["change"] for one in found["nearest"])
    code, _, error = run("train", out)
    assert (code, "found nothing that fits" in error) == (1, True)


def test_nothing_of_the_users_is_replaced(run: Command, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    out.write_text('{"mine": 1}')
    code, _, error = run("plan", tiny, "--brief", "--out", out)
    assert (code, "was not written by memfit plan" in error) == (1, True)
    assert out.read_text() == '{"mine": 1}'


def test_train_runs_a_plan(
    run: Command, recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path / "cache"))
    wanted = recipe("minicpmv4_6", "hardware.gpus=1xcpu", "batch=2", "schedule.steps=1", "levers.precision=fp32")
    plan = memfit.plan(wanted)
    assert plan.chosen is not None
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"chosen": {"recipe": plan.chosen.recipe.to_json()}, "searched": 1}))
    assert recipe_of_plan(file) == plan.chosen.recipe
    done = memfit.train(file, sets=[f"run.folder={tmp_path / 'run'}"], say=lambda text: None)
    made: dict[str, Any] = json.loads((done.folder / "plan.json").read_text())
    levers = plan.chosen.recipe.levers
    assert made["recipe"]["levers"]["micro_batch"] == levers.micro_batch
    assert made["recipe"]["levers"]["checkpointing"] == levers.checkpointing


def test_master_weights_are_nothing_of_a_micro_batch(dummies: Callable[[str], Path]) -> None:
    """Steps are traced once for bf16-mixed and pure-bf16: they differ in what the optimizer steps only."""
    sets = [f"model={dummies('llama')}", "hardware.gpus=2xRTX4090", "levers.parallel=zero2", "workload.tokens=64"]
    request = step_request(prepare(memfit.read_recipe(sets=sets)))
    found = []
    for precision in ("bf16-mixed", "pure-bf16"):
        levers = dataclasses.replace(request.recipe.levers, precision=precision)  # type: ignore[arg-type]
        trace = trace_step(dataclasses.replace(request, recipe=dataclasses.replace(request.recipe, levers=levers)))
        found.append((trace.peaks, trace.saved, trace.gradients, trace.written, trace.flops))
    assert found[0] == found[1]
