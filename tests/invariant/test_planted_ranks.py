"""Failures planted in engines, and healthy runs under every engine: two CPU ranks, one process group for all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memfit.engine.launch import start
from memfit.inputs.recipe_file import load_recipe
from memfit.specs.proof import Check, Proof
from memfit.testing import make_dummy, make_samples
from memfit.trace.prepare import prepare
from tests import jobs
from tests.flips import EVERYWHERE, Flip
from tests.invariant.ready import deepspeed_is_ready
from tests.planting import Ran, damage, failed
from tests.plants import PLANTS, Plant

SCRIPT = Path(__file__).parent / "planted.py"
HAS_DEEPSPEED = deepspeed_is_ready()
SEVERAL = [name for name in jobs.LAYOUTS if name != "none" and (HAS_DEEPSPEED or not name.startswith("zero"))]
CARD = "hardware.gpus=2xRTX3090"  # what a forecast is laid out for where CPU ranks have one place for all


@dataclass(frozen=True)
class Case:
    """One proof: the recipe, what is planted in it, or what is built instead."""

    layout: str
    sets: tuple[str, ...] = ()
    plant: str | None = None
    other: tuple[str, ...] | None = None
    follow: bool = False


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dummy("minicpmv4_6", tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_samples(tmp_path_factory.mktemp("samples"), 12)


def prove(cases: Sequence[Case], files: tuple[Path, Path], root: Path) -> list[list[Ran]]:
    """Every case on two ranks, one after another; for each what both ranks did. Raises AssertionError for an error."""
    model, data = files
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        folder = jobs.write_job(root / str(number), model, jobs.settings(case.layout, case.sets, data))
        row: dict[str, Any] = {"folder": str(folder), "plant": case.plant, "follow": case.follow, "other": None}
        if case.other is not None:
            words = jobs.settings(case.layout, case.other, data)
            row["other"] = str(jobs.write_job(root / f"{number}-other", model, words))
        rows.append(row)
    file = root / "cases.json"
    file.write_text(json.dumps(rows))
    start([str(SCRIPT), str(file)], 2, root / "logs")
    return [[_ran(Path(row["folder"]) / f"ran.{rank}.json") for rank in range(2)] for row in rows]


def _ran(file: Path) -> Ran:
    found = json.loads(file.read_text())
    assert "error" not in found, found["traceback"]
    ran = Ran(**found)
    if found["proof"] is not None:
        checks = tuple(Check(**check) for check in found["proof"]["checks"])
        values = {name: value for name, value in found["proof"].items() if name != "failed"}
        ran.proof = Proof(**{**values, "checks": checks})
    return ran


def of_engines() -> list[Plant]:
    return [plant for plant in PLANTS if plant.layout in SEVERAL]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_failures_of_engines_are_caught(model: Path, data: Path, tmp_path: Path) -> None:
    plants = of_engines()
    cases = [Case(p.layout, p.sets, name, None, p.shown == "bytes") for p in plants for name in (None, p.name)]
    found = prove(cases, (model, data), tmp_path)
    wrong = []
    for plant, right, planted in zip(plants, found[::2], found[1::2], strict=True):
        if failed(right[0]):
            wrong.append(f"healthy beside {plant.name}: {failed(right[0])}")
        if plant.lever not in failed(planted[0]):
            wrong.append(f"{plant.name} is not caught: {failed(planted[0])}")
        if not _damage(plant, right, planted, (model, data)):
            wrong.append(f"{plant.name} does nothing")
    assert not wrong, "\n".join(wrong)


def _damage(plant: Plant, right: list[Ran], planted: list[Ran], files: tuple[Path, Path]) -> str:
    """What a failure does on two ranks, or on two cards."""
    if plant.shown == "drift":
        apart = [name for name, value in planted[0].weights.items() if planted[1].weights[name] != value]
        same = right[0].weights == right[1].weights
        return f"{len(apart)} tensors differ between the ranks, {apart[0]}" if apart and same else ""
    if plant.shown != "forecast":
        return damage(plant.shown, right[0], planted[0])
    model, data = files
    words = jobs.settings(plant.layout, plant.sets, data)
    sizes = []
    for more in ((), plant.real):
        plan = prepare(load_recipe(None, [*words, CARD, *more], model=str(model))).plan()
        sizes.append(sum(term.bytes for term in plan.forecast.ledger.terms if term.place == "gpu"))
    return f"{sizes[1]:,} B on a card instead of {sizes[0]:,}" if sizes[0] != sizes[1] else ""


def healthy(layout: str) -> tuple[tuple[str, ...], ...]:
    """Recipes of a layout: full in fp32, adapters, and 16 bit with every block checkpointed."""
    narrow = "bf16-amp" if layout == "ddp" else "bf16-mixed"
    return ((), ("method=lora",), (f"levers.precision={narrow}", "levers.checkpointing=full"))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_healthy_runs_are_never_flagged(model: Path, data: Path, tmp_path: Path) -> None:
    cases = [Case(layout, sets, follow=True) for layout in SEVERAL for sets in healthy(layout)]
    found = prove(cases, (model, data), tmp_path)
    wrong = [f"{c.layout} {c.sets}: {failed(ran[0])}" for c, ran in zip(cases, found, strict=True) if failed(ran[0])]
    assert not wrong, "\n".join(wrong)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", SEVERAL)
def test_any_lever_other_than_planned_is_caught(layout: str, model: Path, data: Path, tmp_path: Path) -> None:
    flips: list[Flip] = list(EVERYWHERE)
    found = prove([Case(layout, flip.planned, None, flip.runs) for flip in flips], (model, data), tmp_path)
    missed = [flip.name for flip, ran in zip(flips, found, strict=True) if not failed(ran[0])]
    assert not missed, "\n".join(missed)
