"""pure-bf16 learns what fp32 learns where steps are small; rounded to nearest, it stands still."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from memfit.testing import make_dummy, make_samples
from tests.invariant.trajectories import Case, Common, run_alone

COMMON = (
    "data.eval=0",
    "hardware.gpus=1xcpu",
    "method=full",
    "levers.checkpointing=none",
    "levers.micro_batch=2",
    "batch=2",
    "schedule.steps=150",
    # A step of AdamW is about this much; half a unit of bf16 around 0.02, a usual weight, is 6e-5.
    "schedule.learning_rate=3e-5",
    "schedule.kind=constant",
    "schedule.warmup=0",
    "run.save_every=100000",
)
RUNS = {
    "fp32": ("levers.precision=fp32",),
    "chance": ("levers.precision=pure-bf16",),
    "nearest": ("levers.precision=pure-bf16", "levers.optimizer=adamw-foreach"),  # torch's own
}


def last_losses(root: Path, seed: int) -> dict[str, float]:
    common = Common(make_dummy("qwen2_5_vl", root / "model"), make_samples(root / "samples", 64), COMMON)
    outcomes = {name: run_alone(common, Case(name, (*sets, f"seed={seed}")), root) for name, sets in RUNS.items()}
    return {name: statistics.mean(found.loss[-32:]) for name, found in outcomes.items()}


def check(found: dict[str, float]) -> None:
    assert abs(found["chance"] / found["fp32"] - 1) < 0.01, found
    assert found["nearest"] / found["fp32"] - 1 > 0.03, found


@pytest.mark.long  # a minute; tests/unit/test_stochastic.py holds the rounding itself
def test_small_steps_count(tmp_path: Path) -> None:
    check(last_losses(tmp_path, 0))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2])
def test_small_steps_count_under_other_seeds(tmp_path: Path, seed: int) -> None:
    check(last_losses(tmp_path, seed))
