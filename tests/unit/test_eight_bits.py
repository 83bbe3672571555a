"""bitsandbytes' 8-bit AdamW: its states are the ledger's, embeddings stay wide, and it learns."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from memfit.build.build import Materials
from memfit.engine import train as engine_train
from memfit.engine.train import Job
from memfit.inputs.recipe_file import override
from memfit.inputs.run_folder import RunFolder, write_json
from memfit.planner.plan import plan_json
from memfit.specs.recipe import Recipe
from memfit.trace.prepare import prepare
from tests.unit.test_build import samples_of

Make = Callable[..., Recipe]
# Two tables of 256 numbers that all states share (bitsandbytes.optim.optimizer:Optimizer8bit.fill_qmap).
TABLES = 2 * 256 * 4

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def job_of(recipe: Recipe, folder: Path, optimizer: str) -> Job:
    """A job of a CPU run with an optimizer that plans give to GPUs only."""
    prepared = prepare(recipe)
    plan = prepared.plan()
    levers = dataclasses.replace(plan.recipe.levers, optimizer=optimizer)  # type: ignore[arg-type]
    plan = dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, levers=levers))
    folder.mkdir()
    write_json(folder / "plan.json", plan_json(plan))
    materials = Materials(prepared.source, prepared.family, prepared.profile)
    return Job(plan, materials, samples_of(recipe), (), RunFolder(folder))


def states_of(optimizer: Any) -> int:
    """Bytes of all state tensors, those that several parameters share once."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                found[value.data_ptr()] = value.numel() * value.element_size()
    return sum(found.values())


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "paged-adamw-8bit"])
@pytest.mark.parametrize("sets", [("method=full",), ("method=lora", "lora.rank=16")], ids=["full", "lora"])
def test_states_are_the_ledgers_and_it_learns(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, sets: tuple[str, ...]
) -> None:
    wanted = recipe("qwen2_5_vl", *sets, "schedule.steps=6", "schedule.learning_rate=3e-3", "schedule.warmup=0")
    seen: list[Any] = []
    make = engine_train._trainer

    def watched(*args: Any) -> Any:
        trainer, recorder = make(*args)
        seen.append(trainer)
        return trainer, recorder

    monkeypatch.setattr(engine_train, "_trainer", watched)
    engine_train.train(job_of(wanted, tmp_path / "a", optimizer))
    losses = [row["loss"] for row in seen[0].state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.1

    on_gpu = override(wanted, ["hardware.gpus=1xRTX3090", f"levers.optimizer={optimizer}"])
    terms = prepare(on_gpu).plan().forecast.ledger.terms
    forecast = sum(term.bytes for term in terms if "optimizer" in term.id.split("."))
    shared = TABLES if any("qmap1" in state for state in _inner(seen[0].optimizer).state.values()) else 0
    assert states_of(seen[0].optimizer) == forecast + shared
    wide = [
        state["state1"].dtype
        for parameter, state in _inner(seen[0].optimizer).state.items()
        if parameter is seen[0].model.get_input_embeddings().weight
    ]
    assert set(wide) <= {torch.float32}


def _inner(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
