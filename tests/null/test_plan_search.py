"""The planner's search on a model small enough to try everything: it finds what trying everything finds."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest

from memfit.catalog.context import outside
from memfit.catalog.gpus import find_gpu
from memfit.errors import UserError
from memfit.planner import steps as steps_module
from memfit.planner.activations import device_bytes, with_trace
from memfit.planner.answer import answer
from memfit.planner.axes import Setup, Step, axes_of, ladder, with_choice
from memfit.planner.counting import Counting
from memfit.planner.engine_stages import Stages
from memfit.planner.estimate import estimate_states
from memfit.planner.parts import parameter_groups, resolve_parts
from memfit.planner.search import Candidate, Fit, Limits, Search
from memfit.planner.steps import figures_of
from memfit.planner.tables import NO_LOAD, Model, phase_bytes
from memfit.specs.hardware import Hardware
from memfit.specs.plan import Forecast
from memfit.specs.recipe import Levers, Recipe
from memfit.specs.stretch import Stretch
from memfit.specs.trace import FlopsRow, PeakRow, StepTrace
from memfit.specs.workload import LoaderLoad
from tests.null.hand_model import BUFFERS, FAMILY, TENSORS, profile

PROFILE = profile()
KEPT = {"none": 4, "selective": 2, "full": 1}  # what checkpointing keeps of a block, and inversely computes again
AGAIN = {"none": 0.0, "selective": 0.4, "full": 1.0}
LOAD = LoaderLoad(0, 10, 10)


def hardware(count: int, room: int, host: int | None = None, gpu: str = "A100-40G") -> Hardware:
    """So many cards with `room` bytes beside context and libraries."""
    plain = Hardware(find_gpu(gpu), count, host_memory_bytes=host)
    beside = sum(size for _, size, _, _ in outside(plain))
    return dataclasses.replace(plain, gpu=dataclasses.replace(find_gpu(gpu), capacity_bytes=beside + room))


class HandSteps:
    """Steps of the hand model by formula: `unit` bytes a row and module, no torch (`memfit.planner.search.Tracer`)."""

    def __init__(self, machine: Hardware, unit: int = 40) -> None:
        self.machine, self.unit, self.traced = machine, unit, 0

    def kind(self, counting: Counting) -> Hashable:
        return counting.layout.engine.gather

    def sizes(self, micro: int) -> tuple[int, ...]:
        return (micro,)

    def step(self, counting: Counting) -> tuple[StepTrace, Stages]:
        self.traced += 1
        levers = counting.recipe.levers
        rows = tuple(self._stretches(counting))
        moments = {
            phase: max(r.activations for r in rows if r.phase == phase) for phase in ("forward", "loss", "backward")
        }
        peaks = tuple(PeakRow(phase, size, 0, 0, size, 0, "language", None, "") for phase, size in moments.items())
        micro = int(levers.micro_batch)
        chunk = 1.3 if levers.loss == "chunked" else 1.0
        forward = 10**12 * micro
        work = {"forward": forward, "loss": 10**11 * micro * chunk}
        work["backward"] = 2 * forward + AGAIN[str(levers.checkpointing)] * forward + 2 * 10**11 * micro * chunk
        flops = tuple(FlopsRow(phase, "language", int(size)) for phase, size in work.items())
        trace = StepTrace(
            "gpu", (), 64, 0, {}, (), peaks, peaks, (), flops, stretches=rows, written=10**9 * micro, kernels=2000,
            pinned=1000 * micro if levers.activation_offload else 0,
        )  # fmt: skip
        return trace, Stages(counting, rows, FAMILY.blocks)

    def _stretches(self, counting: Counting) -> list[Stretch]:
        levers, width = counting.recipe.levers, counting.width("")
        micro = int(levers.micro_batch)
        kept = KEPT[str(levers.checkpointing)] * self.unit * micro // (2 if levers.activation_offload else 1)
        logits = (300 if levers.loss == "chunked" else 900) * self.unit * micro
        rows: list[Stretch] = []
        saved, modules = 0, list(dict.fromkeys(name.rpartition(".")[0] for name, _, _ in TENSORS))
        for module in modules:
            saved += kept
            rows.append(Stretch(len(rows), "forward", module, 8 * micro, saved, 7 * micro * self.unit, 0, 40))
        rows.append(Stretch(len(rows), "loss", "", 8 * micro, saved, logits, 0, 10))
        gradients = 0
        for module in reversed(modules):
            rows.append(Stretch(len(rows), "backward", module, 8 * micro, saved, 70 * micro * self.unit, gradients, 0))
            for name, shape, _ in reversed(TENSORS):
                if name.rpartition(".")[0] == module:
                    size = int(np.prod(shape)) * width
                    rows.append(Stretch(len(rows), "backward", module, 8 * micro, saved, 5, gradients, 0, name, size))
                    gradients += size
            saved -= kept
        return rows

    def forecast(self, recipe: Recipe) -> Forecast:
        forecast = estimate_states(recipe, PROFILE, FAMILY, self.machine)
        groups = parameter_groups(PROFILE, resolve_parts(forecast.recipe, FAMILY, PROFILE), forecast.recipe.lora)
        trace, stages = self.step(Counting(forecast.recipe, self.machine, groups))
        return with_trace(forecast, trace, None, stages, LOAD)


def search(recipe: Recipe, machine: Hardware, unit: int = 40) -> Search:
    axes = axes_of(recipe, machine, PROFILE)
    groups = parameter_groups(PROFILE, resolve_parts(recipe, FAMILY, PROFILE), recipe.lora)
    return Search(axes, Model(groups, BUFFERS, lambda micro: LOAD), HandSteps(machine, unit))


def admits(setup: Setup, step: Step) -> bool:
    return not (setup.would or step.would)


def best_of_all(one: Search, tiers: int = 3) -> tuple[int, float] | None:
    """Tier and seconds of the fastest of the lowest tier, by trying every set-up and step with every rung of trims."""
    found = []
    for setup, steps in one.axes.legal.items():
        for step in steps:
            tier = max(setup.tier, step.tier)
            if not admits(setup, step) or tier > tiers:
                continue
            if any(lacks(one, Candidate(setup, step, trim)) == 0 for trim in ladder(one.axes, setup)):
                trace, _ = one.tracer.step(one.tables.counting(setup, step))
                seconds = one.tables.seconds(setup, [step], [figures_of(trace)]).seconds
                found.append((tier, float(np.ravel(seconds)[0])))
    return min(found, default=None)


def lacks(one: Search, candidate: Candidate) -> int:
    device, host = one.needs(candidate)
    short = [device - one.room.device] if one.room.device is not None else []
    short += [host - one.room.host] if one.room.host is not None else []
    return max(0, *short)


def best_found(recipe: Recipe, machine: Hardware, unit: int = 40) -> tuple[int, float] | None:
    """Tier and seconds of the first that a search finds; None where nothing fits or goes together."""
    try:
        fits = search(recipe, machine, unit).run(Limits(admits, 1)).fits
    except UserError:
        return None
    return (fits[0].candidate.tier, fits[0].seconds) if fits else None


LIGHT = Levers(loss="chunked", activation_offload=False)
CASES = [
    ("none, one card", 1, Recipe(model="m", batch=4), 200_000),
    ("none, tight", 1, Recipe(model="m", batch=4), 110_000),
    ("none, tighter", 1, Recipe(model="m", batch=8), 66_000),
    ("ddp or fsdp", 2, Recipe(model="m", batch=4, levers=LIGHT), 130_000),
    ("split or nothing", 2, Recipe(model="m", batch=4, levers=LIGHT), 56_000),
    (
        "zero2 with small buckets",
        2,
        Recipe(model="m", batch=4, levers=dataclasses.replace(LIGHT, parallel="zero2")),
        110_000_000,
    ),
    (
        "zero3 with the usual",
        2,
        Recipe(model="m", batch=4, levers=dataclasses.replace(LIGHT, parallel="zero3")),
        2 * 10**9,
    ),
    (
        "zero3 with small buckets",
        2,
        Recipe(model="m", batch=2, levers=dataclasses.replace(LIGHT, parallel="zero3")),
        210_000_000,
    ),
    ("nothing", 2, Recipe(model="m", batch=4, levers=LIGHT), 2_000),
]


LONGER = {"none, tight", "ddp or fsdp", "zero3 with the usual", "nothing"}
ALL_CASES = [
    pytest.param(*case[1:], id=case[0], marks=[pytest.mark.long] if case[0] in LONGER else []) for case in CASES
]


@pytest.mark.parametrize(("count", "recipe", "room"), ALL_CASES)
def test_the_choice_is_what_trying_everything_gives(count: int, recipe: Recipe, room: int) -> None:
    found = best_found(recipe, hardware(count, room))
    best = best_of_all(search(recipe, hardware(count, room)))
    assert found == pytest.approx(best) if best else found is None
    assert (best is None) == (room < 50_000)


def test_bounds_that_are_too_high_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not traced is left out by its bound: one three times too high loses the best of some case."""
    monkeypatch.setattr(steps_module, "CAUTION", 3.0)
    assert any(
        best_found(recipe, hardware(count, room))
        != pytest.approx(best_of_all(search(recipe, hardware(count, room))), rel=1e-9)
        for _, count, recipe, room in CASES[:5]
    )


def some(one: Search, count: int, seed: int = 5) -> list[Candidate]:
    rng = random.Random(seed)
    setups = list(one.axes.legal)
    found = []
    for _ in range(count):
        setup = rng.choice(setups)
        step, trim = rng.choice(one.axes.legal[setup]), rng.choice(one.tables.trims[setup])
        found.append(Candidate(setup, step, trim))
    return found


def test_a_candidate_needs_what_its_forecast_says() -> None:
    one = search(Recipe(model="m", batch=8), hardware(4, 10**9, 10**12))
    for candidate in some(one, 60):
        forecast = one.tracer.forecast(one.recipe(candidate))
        device, host = one.needs(candidate)
        assert device == max(device_bytes(forecast).values()), candidate
        assert forecast.node is not None
        assert host == forecast.node.peak_bytes, candidate


def test_bounds_on_arrays_are_below_what_a_candidate_needs() -> None:
    one = search(Recipe(model="m", batch=8), hardware(4, 10**9, 10**12))
    for candidate in some(one, 60):
        trace, _ = one.tracer.step(one.tables.counting(candidate.setup, candidate.step))
        floors = one.tables.least(candidate.setup, [candidate.step], figures_of(trace).peaks[None])
        at = one.tables.trims[candidate.setup].index(candidate.trim)
        device, host = one.needs(candidate)
        assert (int(floors.device[at, 0]) <= device, int(floors.host[at, 0]) <= host) == (True, True), candidate


def test_states_on_arrays_are_those_of_each_candidate() -> None:
    """No term depends on two values of the engine: what each changes by itself may be added."""
    one = search(Recipe(model="m", batch=8), hardware(4, 10**9, 10**12))
    for candidate in some(one, 60, seed=6):
        setup, step, trim = candidate.setup, candidate.step, candidate.trim
        device, host = one.tables._bases(setup)
        at = (one.tables.trims[setup].index(trim), int(one.tables.several(step)))
        wanted = phase_bytes(one.tables.counting(setup, step, trim), BUFFERS, NO_LOAD)
        assert device[at].tolist() == wanted[0].tolist(), candidate
        assert host[at].tolist() == wanted[1].tolist(), candidate


PINS: list[dict[str, Any]] = [
    {"parallel": "zero3"}, {"precision": "pure-bf16"}, {"checkpointing": "full"}, {"micro_batch": 2},
    {"offload": "optimizer"}, {"loss": "chunked", "activation_offload": True}, {"optimizer": "sgd"},
]  # fmt: skip


@pytest.mark.parametrize("pins", PINS, ids=str)
def test_pins_are_never_changed_and_never_faster(pins: dict[str, Any]) -> None:
    machine = hardware(2, 3 * 10**9)
    free = search(Recipe(model="m", batch=4), machine).run(Limits(admits, 1)).fits[0]
    levers = Levers(**pins)
    pinned = search(Recipe(model="m", batch=4, levers=levers), machine).run(Limits(admits, 3))
    for fit in pinned.fits:
        for name, value in pins.items():
            assert getattr(fit.forecast.recipe.levers, name) == value
    first = pinned.fits[0]
    if first.candidate.tier == free.candidate.tier and "optimizer" not in pins and "precision" not in pins:
        assert first.seconds >= free.seconds * (1 - 1e-9)


def test_engine_values_that_are_pinned_stay() -> None:
    recipe = Recipe(model="m", batch=4, levers=Levers(parallel="zero3"), engine={"zero": {"sub_group_size": 7 * 10**8}})
    outcome = search(recipe, hardware(2, 210_000_000)).run(Limits(admits, 2))
    assert outcome.fits
    for fit in outcome.fits:
        values = fit.forecast.recipe.engine["zero"]
        assert values["sub_group_size"] == 7 * 10**8
        assert values["reduce_bucket_size"] < 5 * 10**8, "a bucket of a gigabyte does not fit here"


@pytest.mark.parametrize("count", [1, 2])
def test_more_room_never_loses_a_plan(count: int) -> None:
    recipe = Recipe(model="m", batch=4, levers=LIGHT)
    before: Fit | None = None
    for room in (20_000, 50_000, 66_000, 80_000, 120_000, 400_000):
        fits = search(recipe, hardware(count, room)).run(Limits(admits, 1)).fits
        assert fits or before is None, room
        if before is not None and fits:
            now = fits[0]
            assert (now.candidate.tier, now.seconds) <= (before.candidate.tier, before.seconds * (1 + 1e-9)), room
        before = fits[0] if fits else None
    assert before is not None


def test_shorter_samples_and_more_cards_never_lose_a_plan() -> None:
    recipe = Recipe(model="m", batch=8, levers=LIGHT)
    fits = {}
    for unit, count in itertools.product((10, 40), (2, 4)):
        fits[unit, count] = search(recipe, hardware(count, 60_000), unit).run(Limits(admits, 1)).fits
    assert all(fits.values())
    assert fits[10, 2][0].seconds <= fits[40, 2][0].seconds * (1 + 1e-9)


def test_tiers_are_taken_in_order_and_only_as_far_as_allowed() -> None:
    levers = Levers(parallel="none", checkpointing="full", loss="chunked")
    tight = hardware(1, 60_000)
    chosen = answer(search(Recipe(model="m", batch=1, levers=levers), tight), 3).chosen
    assert chosen is not None
    assert chosen.tier == 2
    strict = answer(search(Recipe(model="m", batch=1, levers=levers, allow="nothing"), tight), 3)
    assert strict.chosen is None
    assert any("tier 2" in offer.why for offer in strict.offers)
    roomy = answer(search(Recipe(model="m", batch=1, levers=levers), hardware(1, 10**6)), 3).chosen
    assert roomy is not None
    assert roomy.tier == 1


def test_every_shortfall_can_be_computed_again() -> None:
    one = search(Recipe(model="m", batch=4, levers=LIGHT), hardware(2, 40_000))
    outcome = one.run(Limits(admits, 3))
    for miss in outcome.misses:
        short = lacks(one, miss.candidate)
        assert miss.short == short if not miss.bound else 0 < miss.short <= short, miss
    assert {miss.bound for miss in outcome.misses} == {False, True}


def test_host_memory_is_judged_too() -> None:
    levers = Levers(parallel="zero3", offload="optimizer")
    free = search(Recipe(model="m", batch=4, levers=levers), hardware(2, 3 * 10**9, 10**13))
    fit = free.run(Limits(admits, 1)).fits[0]
    need = free.needs(fit.candidate)[1]
    small = search(Recipe(model="m", batch=4, levers=levers), hardware(2, 3 * 10**9, need // 2)).run(Limits(admits, 1))
    assert not small.fits
    assert {miss.place for miss in small.misses} == {"host"}


def test_what_goes_together_with_nothing_is_told() -> None:
    with pytest.raises(UserError, match="bf16-amp does not run with parallel: zero3"):
        search(Recipe(model="m", levers=Levers(parallel="zero3", precision="bf16-amp")), hardware(2, 10**9))


def test_a_hundred_thousand_candidates_take_a_second() -> None:
    """Distinct, compatible and counted once; three times the time is granted to busy machines."""
    one = search(Recipe(model="m", batch=128), hardware(2, 10**10))
    keys = {
        repr(with_choice(one.axes, setup, step, trim))
        for setup in list(one.axes.legal)[:3]
        for step in one.axes.legal[setup]
        for trim in one.tables.trims[setup]
    }
    few = list(one.axes.legal)[:3]
    assert len(keys) == sum(len(one.axes.legal[setup]) * len(one.tables.trims[setup]) for setup in few)
    start = time.process_time()
    again = search(Recipe(model="m", batch=128), hardware(2, 10**10))
    outcome = again.run(Limits(admits, 0))
    assert outcome.searched >= 100_000
    assert time.process_time() - start < 3


NEVER_BETTER = (("parallel", "zero3"), ("parallel", "fsdp"), ("checkpointing", "full"), ("micro_batch", 1))


def no_worse(after: tuple[int, float] | None, before: tuple[int, float] | None) -> bool:
    if before is None or after is None:
        return before is None
    return after[0] < before[0] or (after[0] == before[0] and after[1] <= before[1] * (1 + 1e-9))


def check_properties(seed: int) -> None:
    """More memory, more cards and less in every sample never lose a plan, nor a pin gain one; tiers stay allowed."""
    rng = random.Random(seed)
    pins: dict[str, Any] = {
        "loss": "chunked",
        "activation_offload": False,
        **dict(rng.sample(NEVER_BETTER, rng.randint(0, 1))),
    }
    allow: Any = rng.choice(("nothing", "rounding", "learning"))
    recipe = Recipe(model="m", batch=8, levers=Levers(**pins), allow=allow)
    room = int(10 ** rng.uniform(4.4, 9.5))
    host = rng.choice((None, 10**9, 10**12))
    before = best_found(recipe, hardware(2, room, host))
    assert no_worse(best_found(recipe, hardware(2, int(1.4 * room), host)), before), "more memory of a card"
    if host is not None:
        assert no_worse(best_found(recipe, hardware(2, room, 2 * host)), before), "more memory of the node"
    assert no_worse(best_found(recipe, hardware(2, room, host), unit=10), before), "shorter samples, smaller pictures"
    if before is not None:
        assert best_found(recipe, hardware(4, room, None if host is None else 2 * host)) is not None, "more cards"
    key, value = rng.choice(NEVER_BETTER)
    if key not in pins:
        pins[key] = value
        recipe = dataclasses.replace(recipe, levers=Levers(**pins))
        assert no_worse(before, best_found(recipe, hardware(2, room, host))), "a pin"
    try:
        result = answer(search(recipe, hardware(2, room, host)), 3)
    except UserError:
        return
    for plan in result.ranked:
        assert plan.tier <= {"nothing": 1, "rounding": 2, "learning": 3}[allow]
        assert {name: getattr(plan.recipe.levers, name) for name in pins} == pins


def test_properties_of_a_random_recipe() -> None:
    check_properties(seed=11)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(24))
def test_properties_of_random_recipes(seed: int) -> None:
    check_properties(seed)
