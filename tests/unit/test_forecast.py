"""The whole forecast: states and a traced micro-batch add up to the peaks that the contract names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

import memfit
from memfit.catalog.gpus import parse_hardware
from memfit.errors import UserError
from memfit.inputs.recipe_file import override
from memfit.planner.activations import peak_of
from memfit.planner.estimate_text import estimate_text
from memfit.planner.forecast_json import forecast_json
from memfit.specs.plan import Forecast
from memfit.specs.recipe import Recipe
from memfit.trace.forecast import forecast_plan
from memfit.trace.prepare import prepare
from tests.unit.conftest import VISION_KINDS

Make = Callable[..., Recipe]
PLACES = ("gpu", "allocator", "context", "comm")
ON_GPU = ("hardware.gpus=1xRTX3090", "workload.tokens=400", "workload.image_size=120x90", "batch=2")


# 10 MB of bucket in 16 bit: more than a tiny model has logits, so that the peak is where the bucket is.
SPLIT = ("engine.zero.reduce_bucket_size=5e6", "engine.zero.stage3_param_persistence_threshold=100")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "ddp": ("levers.parallel=ddp",),
    "zero1": ("levers.parallel=zero1", SPLIT[0]),
    "zero2": ("levers.parallel=zero2", SPLIT[0], "batch=8"),
    "zero2-offload": ("levers.parallel=zero2", SPLIT[0], "levers.offload=optimizer", "batch=8"),
    "zero3": ("levers.parallel=zero3", *SPLIT),
    "zero3-lora": ("levers.parallel=zero3", *SPLIT, "method=lora"),
    "zero3-offload": ("levers.parallel=zero3", *SPLIT, "levers.offload=params+optimizer"),
    "zero3-nvme": ("levers.parallel=zero3", *SPLIT, "levers.offload=params+optimizer", "levers.offload_to=nvme"),
    "zero3-saved": ("levers.parallel=zero3", *SPLIT, "method=lora", "lora.modules_to_save=[embed_tokens]"),
    "fsdp": ("levers.parallel=fsdp",),
    "fsdp-lora": ("levers.parallel=fsdp", "method=lora"),
    "fsdp-offload": ("levers.parallel=fsdp", "levers.offload=params+optimizer"),
}


def sums_hold(forecast: Forecast) -> bool:
    """Whether terms add up to what the contract names, and the ledger to what the allocator was asked for."""
    gpu, node = forecast_json(forecast)["gpu"], forecast.node
    alive = [term for term in gpu["terms"] if gpu["peak_phase"] in term["alive"]]
    sums = {place: sum(t["bytes"] for t in alive if t["place"] == place) for place in PLACES}
    ids = {term.id for term in forecast.ledger.terms}
    rounding = sum(term["bytes"] for term in gpu["terms"] if term["id"] == "rounding")
    assert forecast.reserved is not None
    assert node is not None
    host = forecast.ledger.phase_bytes("host")
    return (
        sums["gpu"] == gpu["peak_allocated_bytes"]
        and sums["gpu"] + sums["allocator"] == gpu["peak_reserved_bytes"]
        and gpu["process_bytes"] == gpu["peak_reserved_bytes"] + sums["context"] + sums["comm"]
        # The replay follows the same story event by event: its own peak is the ledger's.
        and forecast.reserved.requested == gpu["peak_allocated_bytes"] - rounding
        and all(isinstance(size, int) for size in gpu["phases"].values())
        and node.peak_bytes == max(host.values())
        and len(ids) == len(forecast.ledger.terms)
    )


@pytest.mark.parametrize("kind", [*VISION_KINDS, "llama", "qwen3"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_terms_sum_to_the_totals(recipe: Make, kind: str, method: str) -> None:
    forecast = memfit.estimate(recipe(kind, f"method={method}", "levers.precision=auto", *ON_GPU))
    assert sums_hold(forecast)
    assert all(term.bytes > 0 or term.id in ("rounding", "allocator.cached") for term in forecast.ledger.terms)
    assert forecast.verdict == "fits"


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_terms_sum_to_the_totals_under_every_engine(recipe: Make, name: str) -> None:
    sets = (*ON_GPU, "hardware.gpus=2xRTX3090", "batch=4", "levers.precision=auto", *LAYOUTS[name])
    forecast = memfit.estimate(recipe("llama", *sets))
    assert sums_hold(forecast)
    ids = {term.id for term in forecast.ledger.terms}
    assert "comm.nccl" in ids
    for wanted in ENGINE_TERMS.get(name, ()):
        assert wanted in ids, wanted
    offloads = "offload" in name or "nvme" in name
    data = forecast_json(forecast)
    assert (
        {"adapter.optimizer.language", "optimizer.language"} & {t["id"] for t in data["gpu"]["terms"]} == set()
    ) == offloads
    assert (data["disk"]["nvme_bytes"] > 0) == (name == "zero3-nvme")
    assert data["interval"]["low_bytes"] < data["gpu"]["process_bytes"] < data["interval"]["high_bytes"]


ENGINE_TERMS = {
    "zero1": ("zero1.reduce_bucket.backward", "zero1.step_wide", "gradients.so_far.backward"),
    "zero2": ("zero2.reduce_bucket.backward", "zero2.gradient_partition.backward", "zero2.step_flat"),
    "zero2-offload": (
        "zero2.offload_weights",
        "zero2.offload_sums",
        "zero2.offload_gradient_buffer",
        "pinned.rounding",
    ),
    "zero3": ("zero3.reduce_bucket", "zero3.weights.persistent", "zero3.gathered.forward", "zero3.save_gather"),
    "zero3-offload": ("zero3.gradients.partitions", "pinned.rounding"),
    "zero3-nvme": ("zero3.swap_optimizer", "zero3.swap_parameters"),
    "fsdp": ("fsdp.gathered.loss", "fsdp.gathered.backward", "fsdp.load_gather"),
}


def test_a_term_that_is_wrong_by_a_tenth_breaks_the_sum(recipe: Make) -> None:
    """The check above can fail, term by term: one is changed, nothing else."""
    sets = (*ON_GPU, "hardware.gpus=2xRTX3090", "batch=4", "levers.precision=auto")
    for name in ("none", "zero2", "fsdp"):
        more = LAYOUTS.get(name, ("hardware.gpus=1xRTX3090",))
        forecast = memfit.estimate(recipe("llama", *sets, *more))
        found = peak_of(forecast)
        for place, term in enumerate(forecast.ledger.terms):
            if found is None or found[0] not in term.alive or term.bytes < 10 or term.place in ("host", "disk"):
                continue
            terms = list(forecast.ledger.terms)
            terms[place] = dataclasses.replace(term, bytes=int(term.bytes * 1.1))
            wrong = dataclasses.replace(forecast, ledger=dataclasses.replace(forecast.ledger, terms=tuple(terms)))
            assert not sums_hold(wrong) or term.place in ("context", "comm"), term.id


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


def test_splitting_and_offloading_move_the_peak_the_right_way(recipe: Make) -> None:
    def peak(*sets: str) -> int:
        found = peak_of(memfit.estimate(recipe("llama", *ON_GPU, "batch=8", "levers.precision=auto", *sets)))
        return found[1] if found else 0

    two = ("hardware.gpus=2xRTX3090", *SPLIT)
    zero1, zero2, zero3 = (peak(*two, f"levers.parallel={name}") for name in ("zero1", "zero2", "zero3"))
    assert zero2 < zero1
    assert peak("hardware.gpus=4xRTX3090", *SPLIT, "levers.parallel=zero2") < zero2
    assert peak(*two, "levers.parallel=zero3", "levers.offload=optimizer") < zero3
    assert peak(*two, "levers.parallel=zero2", "engine.zero.reduce_bucket_size=auto") < zero2
    large = (*two, "levers.parallel=zero2", "engine.zero.reduce_bucket_size=2e7")
    assert peak(*large, "engine.zero.overlap_comm=true") - peak(*large) == 2e7 * 2


def test_unknown_engine_values_are_refused(recipe: Make) -> None:
    two = (*ON_GPU, "hardware.gpus=2xRTX3090", "levers.precision=auto", "batch=4", "levers.parallel=zero2")
    with pytest.raises(UserError, match="did you mean reduce_bucket_size"):
        memfit.estimate(recipe("llama", *two, "engine.zero.reduce_bucket=5e8"))
    with pytest.raises(UserError, match="says nothing to this engine"):
        memfit.estimate(recipe("llama", *two, "engine.fsdp.reshard_root=true"))
    with pytest.raises(UserError, match=r"levers\.offload: params"):
        memfit.estimate(recipe("llama", *two, "levers.offload=params+optimizer"))


def test_a_full_card_is_judged_by_the_replay_at_its_capacity(recipe: Make) -> None:
    """Reserved without end is more than this card has left; with its cache emptied in between, the run still passes."""
    gpu = parse_hardware("1xRTX3090").gpu
    assert gpu is not None
    forecast = memfit.estimate(recipe("llama", *ON_GPU))
    reserved = forecast.reserved
    assert reserved is not None
    beside = sum(size for _, size, _ in reserved.outside)
    found = prepare(recipe("llama", *ON_GPU))
    events, verdicts = reserved.peak_reserved, {}
    for spare in (0, -(2 << 20), -events):
        card = dataclasses.replace(gpu, capacity_bytes=beside + events + spare)
        small = dataclasses.replace(found, hardware=dataclasses.replace(found.hardware, gpu=card))
        verdicts[spare] = forecast_plan(small).forecast
    assert verdicts[0].fits
    assert verdicts[0].verdict == "borderline"
    assert verdicts[-events].fits is False
    less = verdicts[-(2 << 20)]
    assert less.reserved is not None
    assert less.reserved.unlimited == events
    if less.reserved.runs:
        assert less.reserved.smallest is not None
        assert less.reserved.smallest <= events - (2 << 20)


def test_the_text_tells_the_peak_and_that_no_gpu_confirmed_it(recipe: Make) -> None:
    text = estimate_text(memfit.estimate(recipe("llava", *ON_GPU)))
    assert text.startswith("fits: the process peaks at")
    assert "no GPU has confirmed this yet" in text
    assert "speed: " in text
