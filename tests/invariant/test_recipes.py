"""The recipes for CPU ranks run as they stand, on a tiny model: from the command's function to the evaluated run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import memfit
from memfit.api import TrainResult
from memfit.inputs.recipe_file import load_recipe
from memfit.specs.evaluate import EvaluateRequest
from memfit.testing import make_dummy, make_samples
from tests.invariant.ready import deepspeed_is_ready

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("cpu-*.yaml"))
LONG = [pytest.param(path, id=path.stem, marks=pytest.mark.long) for path in RECIPES if path.stem != "cpu-fsdp-offload"]


def run(path: Path, folder: Path) -> TrainResult:
    if "zero" in path.stem and not deepspeed_is_ready():
        pytest.skip("DeepSpeed or its compiled operators are missing: make ops")
    data = make_samples(folder / "samples", 9)
    sets = [f"data.train={data}", "schedule.steps=2", "generate.max_new_tokens=4", f"run.folder={folder / 'run'}"]
    recipe = load_recipe(path, sets, model=str(make_dummy("minicpmv4_6", folder / "model")))
    return memfit.train(recipe, say=lambda text: None)


def check(result: TrainResult, folder: Path) -> None:
    rows = [json.loads(line) for line in (result.folder / "run.jsonl").read_text().splitlines()]
    (began,) = [row for row in rows if row["event"] == "start"]
    assert began["ranks"] == 2
    engine = json.loads((result.folder / "engine.json").read_text())
    assert engine["name"] == began["engine"]
    assert result.model is not None
    assert (result.folder / "logs" / "rank-1.jsonl").exists()
    request = EvaluateRequest(str(result.folder), data=folder / "samples" / "data.json", limit=3)
    (found,) = memfit.evaluate(request, say=lambda text: None).evaluations
    assert len(found.documents) == 3


def test_fsdp_from_recipe_to_scores(tmp_path: Path) -> None:
    check(run(next(path for path in RECIPES if path.stem == "cpu-fsdp-offload"), tmp_path), tmp_path)


@pytest.mark.parametrize("path", LONG)
def test_the_other_recipes_run(path: Path, tmp_path: Path) -> None:
    check(run(path, tmp_path), tmp_path)
