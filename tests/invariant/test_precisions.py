"""Every precision of every layout trains on several ranks, and each rank holds what the ledger says."""

from __future__ import annotations

from pathlib import Path

import pytest

from memfit.testing import make_dummy, make_samples
from tests.invariant.ready import deepspeed_is_ready
from tests.invariant.test_trajectories import LAYOUTS, TWO, check_states
from tests.invariant.trajectories import Case, Common, Outcome, run_alone, run_in_ranks

COMMON = (
    "data.eval=0",
    "levers.checkpointing=none",
    "levers.micro_batch=1",
    "batch=4",
    "schedule.steps=4",
    "schedule.learning_rate=1e-3",
    "lora.rank=4",
    "lora.dropout=0",
    "run.save_every=1000",
)
AMP, MIXED, PURE = "bf16-amp", "bf16-mixed", "pure-bf16"
PRECISIONS: dict[str, tuple[str, ...]] = {
    "ddp": (AMP, PURE),
    "fsdp": (AMP, MIXED, PURE),
    "fsdp, all offloaded": (AMP, PURE),
    "zero1": (MIXED, PURE),
    "zero2": (MIXED, PURE),
    "zero2, optimizer offloaded": (MIXED, PURE),
    "zero3": (MIXED, PURE),
    "zero3, optimizer offloaded": (MIXED, PURE),
    "zero3, all offloaded": (MIXED, PURE),
}
NEAR = 0.02  # of a loss of 6: bf16 keeps three digits, and four steps change them all


def cases(names: tuple[str, ...]) -> list[Case]:
    able = [name for name in names if deepspeed_is_ready() or not name.startswith("zero")]
    return [
        Case(f"{name}, {precision}", (TWO, *LAYOUTS[name], f"levers.precision={precision}"))
        for name in able
        for precision in PRECISIONS[name]
    ]


def check(alone: Outcome, outcomes: dict[str, Outcome]) -> None:
    for name, found in outcomes.items():
        assert found.tokens == alone.tokens, name
        for own, wanted in zip(found.loss, alone.loss, strict=True):
            assert abs(own - wanted) <= NEAR * wanted, f"{name}: {found.loss} against {alone.loss}"
        check_states(found)


def run(kinds: dict[str, tuple[str, ...]], names: tuple[str, ...], root: Path) -> None:
    data = make_samples(root / "samples", 13)
    wanted, alone = [], []
    for kind, own in kinds.items():
        recipe = Common(make_dummy(kind, root / kind), data, (*COMMON, *own))
        exact = Case("fp32", ("hardware.gpus=1xcpu", "levers.precision=fp32"))
        alone.append(run_alone(recipe, exact, root / "alone" / kind))
        wanted.append((recipe, cases(names)))
    for one, several in zip(alone, run_in_ranks(wanted, root / "ranks", 2), strict=True):
        check(one, several)


@pytest.mark.long
def test_sixteen_bits_on_two_ranks(tmp_path: Path) -> None:
    run({"qwen2_5_vl": ("method=full",), "minicpmv4_6": ("method=lora",)}, ("ddp", "fsdp", "zero2"), tmp_path)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", ["minicpmv4_6", "qwen2_5_vl", "minicpmv2_6"])
def test_every_precision_of_every_layout(tmp_path: Path, kind: str, method: str) -> None:
    run({kind: (f"method={method}",)}, tuple(PRECISIONS), tmp_path)
