"""The whole forecast: states and a traced micro-batch add up to the peaks that the contract names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

import memfit
from memfit.errors import UserError
from memfit.inputs.recipe_file import override
from memfit.planner.activations import peak_of
from memfit.planner.estimate_text import estimate_text
from memfit.planner.forecast_json import forecast_json
from memfit.specs.recipe import Recipe
from memfit.trace.forecast import forecast_plan
from memfit.trace.prepare import prepare
from tests.unit.conftest import VISION_KINDS

Make = Callable[..., Recipe]
ON_GPU = ("hardware.gpus=1xRTX3090", "workload.tokens=400", "workload.image_size=120x90", "batch=2")


@pytest.mark.parametrize("kind", [*VISION_KINDS, "llama", "qwen3"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_terms_sum_to_the_totals(recipe: Make, kind: str, method: str) -> None:
    forecast = memfit.estimate(recipe(kind, f"method={method}", "levers.precision=auto", *ON_GPU))
    gpu = forecast_json(forecast)["gpu"]
    alive = [term for term in gpu["terms"] if gpu["peak_phase"] in term["alive"]]
    sums = {place: sum(t["bytes"] for t in alive if t["place"] == place) for place in ("gpu", "allocator", "context")}
    assert sums["gpu"] == gpu["peak_allocated_bytes"]
    assert sums["gpu"] + sums["allocator"] == pytest.approx(gpu["peak_reserved_bytes"], abs=4096)
    assert gpu["process_bytes"] == gpu["peak_reserved_bytes"] + sums["context"]
    assert gpu["peak_reserved_bytes"] >= gpu["peak_allocated_bytes"]
    assert all(
        isinstance(term["bytes"], int) and term["bytes"] > 0 for term in gpu["terms"] if term["id"] != "rounding"
    )
    assert gpu["phases"]["evaluate"] is None
    assert forecast.verdict == "fits"


def test_a_term_that_is_wrong_by_a_tenth_breaks_the_sum(recipe: Make) -> None:
    """The check above can fail: one term changed, nothing else."""
    forecast = memfit.estimate(recipe("llava", *ON_GPU))
    terms = list(forecast.ledger.terms)
    place = next(i for i, term in enumerate(terms) if term.id == "activations.backward")
    terms[place] = dataclasses.replace(terms[place], bytes=int(terms[place].bytes * 1.1))
    wrong = dataclasses.replace(forecast, ledger=dataclasses.replace(forecast.ledger, terms=tuple(terms)))
    gpu = forecast_json(wrong)["gpu"]
    cached = sum(t["bytes"] for t in gpu["terms"] if t["place"] == "allocator")
    assert gpu["peak_allocated_bytes"] + cached != pytest.approx(gpu["peak_reserved_bytes"], abs=4096)


def test_levers_move_the_peak_the_right_way(recipe: Make) -> None:
    def peak(*sets: str) -> int:
        # Allocated, not reserved: segments of 20 MiB would hide what a tiny model moves.
        found = peak_of(memfit.estimate(recipe("minicpmv4_6", *ON_GPU, *sets)))
        return found[1] if found else 0

    plain = peak()
    assert peak("levers.checkpointing=full") < plain
    assert peak("parts.vision=frozen", "parts.connector=frozen") < plain
    assert peak("workload.tokens=4000") > plain
    assert peak("levers.micro_batch=1") < plain
    assert peak("levers.attention=eager", "workload.tokens=4000") > peak("workload.tokens=4000")


def test_the_second_time_comes_from_the_cache_and_is_equal(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe("qwen2_5_vl", *ON_GPU, "workload.tokens=333")
    first = memfit.estimate(wanted)
    monkeypatch.setattr("memfit.trace.step.trace_step", None)
    again = memfit.estimate(wanted)
    assert forecast_json(again) == forecast_json(first)


def test_the_data_decides_the_workload(recipe: Make) -> None:
    """Without workload keys the longest sample of the file is traced: fewer tokens than the default, less memory."""
    default = memfit.estimate(override(recipe("llava", "hardware.gpus=1xA10"), ["data.train=null"]))
    own = memfit.estimate(recipe("llava", "hardware.gpus=1xA10"))
    assert own.trace is not None
    assert default.trace is not None
    assert own.trace.inputs < default.trace.inputs


def test_pictures_that_need_more_tokens_than_pinned_are_refused(recipe: Make) -> None:
    with pytest.raises(UserError, match="pictures alone take"):
        memfit.estimate(recipe("minicpmv4_6", "hardware.gpus=1xA10", "workload.tokens=10"))


def test_several_gpus_under_zero_stay_unknown_and_say_so(recipe: Make) -> None:
    found = prepare(recipe("llama", "hardware.gpus=2xA10", "levers.parallel=zero2", "levers.precision=auto"))
    forecast = forecast_plan(found).forecast
    assert forecast.verdict == "unknown"
    assert "activations" in forecast.ledger.missing
    assert forecast_json(forecast)["gpu"]["peak_allocated_bytes"] is None


def test_the_text_tells_the_peak_and_that_no_gpu_confirmed_it(recipe: Make) -> None:
    text = estimate_text(memfit.estimate(recipe("llava", *ON_GPU)))
    assert text.startswith("fits: the process peaks at")
    assert "no GPU has confirmed this yet" in text
    assert "not forecast yet: host memory beyond states, disk, speed" in text
