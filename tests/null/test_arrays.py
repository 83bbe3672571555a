"""One physics: array totals of random candidates equal the sums of their ledgers, to the byte."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest

from memfit.catalog.gpus import parse_hardware
from memfit.catalog.precisions import PRECISIONS
from memfit.errors import UserError
from memfit.planner import arrays
from memfit.planner.activations import with_trace
from memfit.planner.arrays import Candidate, device_totals
from memfit.planner.counting import Counting
from memfit.planner.engine_stages import Stages
from memfit.planner.estimate import estimate_states
from memfit.planner.parts import parameter_groups, resolve_parts
from memfit.specs.ledger import PHASES
from memfit.specs.plan import Forecast
from memfit.specs.recipe import Levers, Lora, Recipe
from memfit.specs.stretch import Stretch
from memfit.specs.trace import StepTrace
from memfit.strategies import STRATEGIES
from tests.null.hand_model import BUFFERS, FAMILY, NUMEL, TENSORS, profile

COUNT = 1000
FEW = 120  # enough to see a planted error
PROFILE = profile()


def stretches(width: int) -> tuple[Stretch, ...]:
    """A step of the hand model: every module forward, the loss, every module back with its gradients."""
    rows: list[Stretch] = []
    saved, modules = 100, list(dict.fromkeys(name.rpartition(".")[0] for name, _, _ in TENSORS))
    for place, module in enumerate(modules):
        saved += 40 * (place % 5)
        rows.append(Stretch(len(rows), "forward", module, 64, saved, 30 * (place % 3) + 7, 0, 40))
    rows.append(Stretch(len(rows), "loss", "", 64, saved, 900, 0, 10))
    gradients = 0
    for place, module in enumerate(reversed(modules)):
        rows.append(Stretch(len(rows), "backward", module, 64, saved, 700 - 60 * place, gradients, 0))
        for name, shape, _ in reversed(TENSORS):
            if name.rpartition(".")[0] == module:
                size = int(np.prod(shape)) * width
                rows.append(Stretch(len(rows), "backward", module, 64, saved, 11, gradients, 0, name, size))
                gradients += size
        saved -= 20
    rows.append(Stretch(len(rows), "backward", "", 64, saved, 3, gradients, 0))
    return tuple(rows)


def drawn(rng: random.Random) -> tuple[Forecast, Candidate] | None:
    """One random choice, as a ledger and as a candidate; None where it does not go together."""
    parallel: Any = rng.choice(["none", "ddp", "zero1", "zero2", "zero3", "fsdp"])
    ranks = 1 if parallel == "none" else rng.choice([2, 3, 4, 8])
    offload: Any = rng.choice(["none", "none", "optimizer", "params+optimizer"])
    levers = Levers(
        parallel=parallel,
        precision=rng.choice([row.name for row in PRECISIONS.values() if parallel in row.runs_on]),  # type: ignore[arg-type]
        optimizer=rng.choice(["adamw", "adamw-foreach", "sgd"]),
        offload=offload,
        offload_to=rng.choice(["host", "nvme"]) if parallel == "zero3" else "host",
    )
    values: dict[str, Any] = {}
    if parallel.startswith("zero"):
        values["zero"] = {
            "reduce_bucket_size": rng.choice([0, 50, 300, 2000, "auto"]),
            "overlap_comm": rng.random() < 0.5,
            "sub_group_size": rng.choice([100, 1000, 10**9]),
            "stage3_prefetch_bucket_size": rng.choice([0, 100, 1000]),
            "stage3_max_reuse_distance": rng.choice([0, 200, 10**9]),
            "stage3_max_live_parameters": rng.choice([500, 10**9]),
            "stage3_param_persistence_threshold": rng.choice([0, 20, 300]),
        }
    elif parallel == "fsdp":
        values["fsdp"] = {"reshard_root": rng.random() < 0.5}
    recipe = Recipe(model="m", levers=levers, engine=values, batch=ranks * rng.choice([1, 3]))
    hardware = parse_hardware(f"{ranks}xA100-40G" if rng.random() < 0.8 else f"{ranks}xcpu")
    try:
        forecast = estimate_states(recipe, PROFILE, FAMILY, hardware)
    except UserError:
        return None
    effective = forecast.recipe
    groups = parameter_groups(PROFILE, resolve_parts(effective, FAMILY, PROFILE), effective.lora)
    counting = Counting(effective, hardware, groups)
    stages = Stages(counting, stretches(counting.width("")), FAMILY.blocks)
    device: Any = "gpu" if hardware.gpu else "cpu"
    trace = StepTrace(device, (), 64, 0, {}, (), (), (), (), (), stretches=stages.stretches)
    return with_trace(forecast, trace, None, stages), Candidate(counting, stages, BUFFERS)


@pytest.fixture(scope="module")
def many() -> tuple[list[Forecast], list[Candidate]]:
    """1,000 random candidates that go together."""
    rng, forecasts, candidates = random.Random(20261121), [], []
    while len(candidates) < COUNT:
        found = drawn(rng)
        if found:
            forecasts.append(found[0])
            candidates.append(found[1])
    return forecasts, candidates


def ledger_totals(forecast: Forecast) -> dict[str, int]:
    place = "gpu" if forecast.hardware.gpu else "host"
    terms = [term for term in forecast.ledger.at(place) if term.part != "host"]
    return {phase: sum(term.bytes for term in terms if phase in term.alive) for phase in PHASES if phase != "evaluate"}


def test_a_thousand_array_totals_equal_their_ledgers(many: tuple[list[Forecast], list[Candidate]]) -> None:
    forecasts, candidates = many
    totals = device_totals(candidates)
    for number, forecast in enumerate(forecasts):
        found = {phase: int(totals[phase][number]) for phase in totals}
        assert found == ledger_totals(forecast), forecast.recipe.levers
    assert {forecast.recipe.levers.parallel for forecast in forecasts} == set(STRATEGIES)
    assert sum(forecast.recipe.levers.offload != "none" for forecast in forecasts) > 100


@pytest.mark.parametrize("name", ["learning", "gradients", "master", "optimizer"])
def test_a_tenth_more_of_any_state_is_seen(
    many: tuple[list[Forecast], list[Candidate]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forecasts, candidates = (rows[:FEW] for rows in many)
    true = arrays._number
    monkeypatch.setattr(
        arrays, "_number", lambda states, field: int(true(states, field) * (1.1 if field == name else 1))
    )
    totals = device_totals(candidates)
    wrong = sum(
        any(int(totals[phase][number]) != size for phase, size in ledger_totals(forecast).items())
        for number, forecast in enumerate(forecasts)
    )
    assert wrong > FEW // 10


def test_a_tenth_more_of_any_engine_piece_is_seen(many: tuple[list[Forecast], list[Candidate]]) -> None:
    forecasts, candidates = (rows[:FEW] for rows in many)
    for piece in ("gathered", "bucket", "copy", "waiting", "scatter", "kept", "partition"):
        changed = []
        for one in candidates:
            stages = Stages(one.counting, one.stages.stretches, one.stages.blocks)
            more = {
                name: [int(size * 1.1) if name == piece else size for size in sizes]
                for name, sizes in one.stages.pieces.items()
            }
            stages.__dict__["pieces"] = more
            changed.append(dataclasses.replace(one, stages=stages))
        totals = device_totals(changed)
        wrong = sum(
            any(int(totals[phase][number]) != size for phase, size in ledger_totals(forecast).items())
            for number, forecast in enumerate(forecasts)
        )
        assert wrong > 2, piece


@pytest.mark.parametrize(("gpus", "kept"), [("2xcpu", sum(NUMEL.values()) // 2 * 4), ("2xA100-40G", 0)])
def test_offloaded_gradients_stay_where_the_host_is_the_device(gpus: str, kept: int) -> None:
    """FSDP2 moves each share of the gradients to the host as it is ready. Between CPU ranks it stays where it was:
    half of every tensor, 4 B an element; a GPU keeps nothing."""
    levers = Levers(parallel="fsdp", precision="fp32", offload="params+optimizer")
    forecast = estimate_states(Recipe(model="m", levers=levers, batch=2), PROFILE, FAMILY, parse_hardware(gpus))
    groups = parameter_groups(PROFILE, resolve_parts(forecast.recipe, FAMILY, PROFILE), forecast.recipe.lora)
    counting = Counting(forecast.recipe, forecast.hardware, groups)
    rows = Stages(counting, stretches(4), FAMILY.blocks).pieces["kept"]
    assert (rows[0], rows[-1]) == (0, kept)


def test_doras_module_has_the_weight_beside_it_gathered() -> None:
    """ZeRO-3 gathers q_proj (256 elements of 2 B) for the layer and for DoRA's module, which is all that runs back."""
    values = {
        "stage3_param_persistence_threshold": 20,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
    }
    levers = Levers(parallel="zero3", precision="bf16-mixed")
    recipe = Recipe(
        model="m", method="lora", lora=Lora(variant="dora"), levers=levers, engine={"zero": values}, batch=2
    )
    forecast = estimate_states(recipe, PROFILE, FAMILY, parse_hardware("2xA100-40G"))
    groups = parameter_groups(PROFILE, resolve_parts(forecast.recipe, FAMILY, PROFILE), forecast.recipe.lora)
    counting = Counting(forecast.recipe, forecast.hardware, groups)
    layer = "lm.layers.0.q_proj"
    modules = [
        ("forward", layer),
        ("forward", f"{layer}.adapter"),
        ("backward", f"{layer}.lora_magnitude_vector.default"),
    ]
    rows = [Stretch(at, phase, module, 0, 0, 0, 0, 0) for at, (phase, module) in enumerate(modules)]
    assert Stages(counting, rows, FAMILY.blocks).pieces["gathered"] == [512, 0, 512]
