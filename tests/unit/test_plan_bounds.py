"""What one traced step says of another is never more than that other takes: every pair, on tiny models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import memfit
from memfit.planner import steps as steps_module
from memfit.planner.axes import Step
from memfit.planner.search import Search
from memfit.planner.steps import figures_of, fixed_of
from memfit.planner.tables import Figures
from memfit.trace.planning import search_of
from memfit.trace.prepare import prepare

WORK = ("flops", "written", "kernels", "pinned")


def searched(model: Path, *sets: str) -> Search:
    fixed = ["hardware.gpus=2xRTX4090", "workload.tokens=512", "batch=8", "levers.optimizer=adamw"]
    return search_of(prepare(memfit.read_recipe(sets=[f"model={model}", *fixed, *sets])))


def traced(one: Search) -> list[tuple[Step, bool, Figures]]:
    """Every step of the first set-up with its figures, and whether gradients wait from one micro-batch to the next."""
    setup, steps = next(iter(one.axes.legal.items()))
    found = []
    for step in steps:
        counting = one.tables.counting(setup, step)
        trace, _ = one.tracer.step(counting)
        _, _, accumulated = one._known_as(setup, step)
        found.append((step, accumulated, figures_of(trace, fixed_of(counting))))
    return found


def too_much(one: Search, known: list[tuple[Step, bool, Figures]]) -> Iterator[str]:
    for (step, waits, mine), (other, others_wait, figures) in itertools.permutations(known, 2):
        found = one.known._bound(step, other, figures)
        over = [name for name in WORK if getattr(found, name) > getattr(mine, name) * (1 + 1e-9)]
        if (waits or not others_wait) and (found.peaks > mine.peaks).any():
            over.append("peaks")
        if over:
            yield f"{step} from {other}: {over}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path / "cache"))


def test_bounds_between_steps(dummies: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    levers = ["levers.parallel=zero2", "levers.precision=bf16-mixed", "levers.activation_offload=false"]
    one = searched(dummies("llama"), *levers, "levers.checkpointing=full")
    known = traced(one)
    assert len(known) == 2 * 3, "two losses, micro-batches of 1, 2 and 4"
    assert not list(too_much(one, known))
    monkeypatch.setattr(steps_module, "ROWS_CAUTION", 1.1)
    assert list(too_much(one, known)), "a bound that is a tenth too high is seen"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("parallel", ["zero3", "ddp", "fsdp"])
@pytest.mark.parametrize("model", ["llama", "minicpmv4_6", "qwen2_5_vl"])
def test_bounds_between_all_steps(dummies: Callable[[str], Path], model: str, parallel: str) -> None:
    pictures = [] if model == "llama" else ["workload.images=1", "workload.image_size=112x112"]
    one = searched(dummies(model), f"levers.parallel={parallel}", *pictures)
    known = traced(one)
    assert len(known) >= 18
    assert not list(too_much(one, known))
