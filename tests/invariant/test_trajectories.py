"""Whatever the layout, the same is learned: one trajectory of losses, gradients and weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from memfit.testing import make_dummy, make_samples
from tests.invariant.ready import deepspeed_is_ready
from tests.invariant.trajectories import (
    GRADIENT,
    LOSS,
    Case,
    Common,
    Outcome,
    follows,
    forecast_states,
    live_states,
    run_alone,
    run_in_ranks,
    worst_gradient,
    worst_loss,
)

HAS_DEEPSPEED = deepspeed_is_ready()
COUNTERS = 2 * 10 * 4  # two ranks, five parts with and without decay, 4 bytes each
COMMON = (
    "data.eval=0",
    "levers.precision=fp32",
    "levers.checkpointing=none",
    "levers.micro_batch=1",
    "batch=4",
    "schedule.learning_rate=1e-3",
    "schedule.weight_decay=0.01",
    "lora.rank=4",
    "lora.dropout=0",
    "run.save_every=1000",
)
TWO = "hardware.gpus=2xcpu"
# Below the threshold a tensor is not split; the tests' models hold no other.
SPLIT_ALL = 'engine={"zero": {"stage3_param_persistence_threshold": 0}}'
NOT_PINNED = "levers.pin_memory=false"
LAYOUTS: dict[str, tuple[str, ...]] = {
    "ddp": ("levers.parallel=ddp",),
    "fsdp": ("levers.parallel=fsdp",),
    "fsdp, all offloaded": ("levers.parallel=fsdp", "levers.offload=params+optimizer", NOT_PINNED),
    "zero1": ("levers.parallel=zero1",),
    "zero2": ("levers.parallel=zero2",),
    "zero2, optimizer offloaded": ("levers.parallel=zero2", "levers.offload=optimizer", NOT_PINNED),
    "zero3": ("levers.parallel=zero3", SPLIT_ALL),
    "zero3, optimizer offloaded": ("levers.parallel=zero3", SPLIT_ALL, "levers.offload=optimizer", NOT_PINNED),
    "zero3, all offloaded": ("levers.parallel=zero3", SPLIT_ALL, "levers.offload=params+optimizer", NOT_PINNED),
}
FAULTS = ("scaled", "dropped", "mean of means")


def cases(names: Sequence[str], *sets: str) -> list[Case]:
    """The layouts that can run here, on two ranks."""
    able = [name for name in names if HAS_DEEPSPEED or not name.startswith("zero")]
    return [Case(name, (TWO, *LAYOUTS[name], *sets)) for name in able]


def check(group: str, alone: Outcome, outcomes: dict[str, Outcome]) -> None:
    """Every outcome follows the one-process run."""
    for name, found in outcomes.items():
        follows(group, name, alone, found)
        if (found.folder / "live.0.json").exists():
            check_states(found)


def check_states(found: Outcome) -> None:
    """What the ranks held is what the ledger says of them, to the byte; step counters of the optimizer excepted.

    Under ZeRO torch's AdamW keeps one for each of its groups, part by part, and the ledger one in all.
    """
    live, forecast = live_states(found.folder), forecast_states(found.folder)
    assert {"weights", "optimizer", "master"} <= live.keys()
    for kind, value in live.items():
        counters = COUNTERS if kind == "optimizer" else 0
        assert abs(value - forecast.get(kind, 0)) <= counters, f"{found.folder.name}: {kind}"


def gaps(one: Outcome, other: Outcome) -> tuple[float, float]:
    """How far the losses and the gradients of two runs over the same tokens are from each other."""
    assert one.tokens == other.tokens
    return worst_loss(one, other), worst_gradient(one, other)


@pytest.fixture(scope="module")
def slips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 samples: neither 2 ranks nor batches of 4 divide them."""
    return make_samples(tmp_path_factory.mktemp("samples"), 13)


def common(kind: str, slips: Path, root: Path, *sets: str) -> Common:
    folder = root / kind
    return Common(folder if folder.is_dir() else make_dummy(kind, folder), slips, (*COMMON, *sets))


def test_two_ranks_learn_what_one_learns(tmp_path: Path, slips: Path) -> None:
    """The short form: one group of processes runs all layouts of two models, and the planted errors."""
    names = ("ddp", "fsdp", "zero2", "zero3, all offloaded")
    steps = "schedule.steps=4"
    full = common("qwen2_5_vl", slips, tmp_path, "method=full", steps)
    lora = common("minicpmv4_6", slips, tmp_path, "method=lora", steps)
    alone = [run_alone(full, Case("none", ("hardware.gpus=1xcpu",)), tmp_path / "full")]
    alone += [run_alone(lora, Case("none", ("hardware.gpus=1xcpu",)), tmp_path / "lora")]
    wrong = [Case(fault, (TWO, *LAYOUTS["ddp"]), fault) for fault in FAULTS]
    outcomes = run_in_ranks([(full, [*cases(names), *wrong]), (lora, cases(names))], tmp_path, 2)
    for one, several in zip(alone, outcomes, strict=True):
        check("short form", one, {name: found for name, found in several.items() if name not in FAULTS})
    wrong_by = {fault: gaps(alone[0], outcomes[0][fault]) for fault in FAULTS}
    assert wrong_by["scaled"][1] > 10 * GRADIENT  # Adam and clipping hide it from the losses
    assert wrong_by["dropped"][0] > 100 * LOSS
    assert wrong_by["mean of means"][0] > 100 * LOSS


@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", ["minicpmv4_6", "qwen2_5_vl", "minicpmv2_6"])
def test_every_layout_and_split_learns_the_same(tmp_path: Path, slips: Path, kind: str, method: str) -> None:
    recipe = common(kind, slips, tmp_path, f"method={method}", "schedule.steps=20")
    alone = run_alone(recipe, Case("none", ("hardware.gpus=1xcpu",)), tmp_path / "one")
    splits = [Case(f"none, micro-batch {size}", (f"levers.micro_batch={size}",)) for size in (2, 4)]
    splits = [Case(case.name, ("hardware.gpus=1xcpu", *case.sets)) for case in splits]
    (of_two,) = run_in_ranks([(recipe, cases(tuple(LAYOUTS)))], tmp_path / "two", 2)
    whole_steps = {case.name: run_alone(recipe, case, tmp_path / "one") for case in splits}
    check(f"{kind}, {method}", alone, of_two | whole_steps)
    (whole,) = run_in_ranks([(recipe, cases(tuple(LAYOUTS), "levers.micro_batch=2"))], tmp_path / "whole", 2)
    check(f"{kind}, {method}, micro-batches of 2", alone, whole)
    single = [Case(case.name, (*case.sets, "hardware.gpus=1xcpu")) for case in cases(tuple(LAYOUTS))]
    (of_one,) = run_in_ranks([(recipe, single)], tmp_path / "single", 1)
    check(f"{kind}, {method}, one rank", alone, of_one)
