"""The forecast of a prepared recipe: states, then one traced micro-batch of the worst batch, then the allocator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memfit.catalog.models import find_row
from memfit.catalog.precisions import PRECISIONS
from memfit.errors import UserError
from memfit.families.names import locator
from memfit.families.tensors import patch_bytes
from memfit.inputs.tape_store import load_tapes
from memfit.inputs.trace_cache import load_replay, load_trace, store_replay, store_trace, trace_key
from memfit.physics.loader import loader_load, reading_bytes
from memfit.planner.activations import with_speed, with_trace
from memfit.planner.counting import LORA_DTYPES, Counting
from memfit.planner.engine_stages import Stages
from memfit.planner.estimate import estimate_states
from memfit.planner.parts import parameter_groups, resolve_parts
from memfit.planner.plan import plan_of
from memfit.planner.replay import SOURCE, replay_steps
from memfit.planner.work import speed_of
from memfit.specs.plan import Forecast, Plan
from memfit.specs.profile import Profile
from memfit.specs.recipe import Recipe, WorkloadKeys
from memfit.specs.sample import Sample
from memfit.specs.trace import Row, StepTrace, TraceBatch
from memfit.specs.workload import ImageCost, LoaderLoad, SampleCost, heaviest
from memfit.trace.collection import no_collection
from memfit.trace.prepare import Prepared
from memfit.trace.recording import step_of
from memfit.trace.request import TraceRequest
from memfit.trace.stretches import stretches
from memfit.trace.tapes import played

if TYPE_CHECKING:
    from memfit.inputs.encode import Encoder

# The documented worst sample where there is no data (docs/recipe.md).
DEFAULT_TOKENS, DEFAULT_IMAGES, DEFAULT_SIZE = 2048, 1, "1344x1344"
# Layouts under which a micro-batch runs on one rank as the trace has it.
TRACED_LAYOUTS = ("none", "ddp", "zero1", "zero2", "zero3", "fsdp")
# Figures of a sample that a loader's memory follows from.
LOADED = ("tokens", "patches", "crops")
SHORT: dict[str, Any] = {full: short for short, full in LORA_DTYPES.items()}


def forecast_plan(
    prepared: Prepared,
    rows: Sequence[Row] = (),
    load: LoaderLoad | None = None,
    made: dict[str, StepTrace] | None = None,
) -> Plan:
    """The plan with its forecast. `rows` are the worst micro-batch; without them the recipe's workload, or the
    documented default, stands in. `load` is what all samples make of the loader; without it these rows' own. `made`
    holds traces of this process by their keys, so that many forecasts of one step trace it once.

    Raises UserError with everything that does not go together, and for a workload whose pictures do not fit its tokens.
    """
    forecast = estimate_states(prepared.recipe, prepared.profile, prepared.family, prepared.hardware)
    forecast = dataclasses.replace(forecast, notes=tuple(_notes(prepared)))
    effective = forecast.recipe
    if effective.levers.parallel not in TRACED_LAYOUTS:
        return plan_of(forecast)
    batch = trace_batch(prepared, forecast.recipe, rows)
    load = load or default_load(prepared, forecast.recipe, batch)
    return plan_of(_traced(prepared, forecast, (batch, load), {} if made is None else made))


def _notes(prepared: Prepared) -> Iterator[str]:
    """What the figures rest on, where that is not the model's own files and the model itself."""
    if prepared.family.forecast_only:
        yield f"forecast only. {prepared.family.forecast_only}"
    row = find_row(prepared.source.catalogued) if prepared.source.catalogued else None
    if row is not None and row.verified == "memory":
        yield f"{row.name}'s sizes are from memory: {row.source}"


def worst_rows(
    samples: Sequence[Sample], costs: Sequence[SampleCost], encoder: Encoder, micro: int, packing: bool = False
) -> tuple[Row, ...]:
    """The worst micro-batch (`heaviest`): long samples, longest first, the one with more patches among equals."""
    # Imported here: a forecast without data reads no pictures, and answers sooner for it.
    from memfit.inputs.data.images import read_size

    order = sorted(range(len(costs)), key=lambda index: (-costs[index].tokens, -costs[index].patches))
    rows = []
    for index in (order[place] for place in heaviest([costs[index].tokens for index in order], micro, packing)):
        sample = samples[index]
        encoded = encoder.encode(sample, [read_size(path) for path in sample.images])
        rows.append(Row(len(encoded.input_ids), encoded.image_costs, costs[index].trained_tokens))
    return tuple(rows)


def load_of(prepared: Prepared, costs: Sequence[SampleCost], reading: int) -> LoaderLoad:
    """What samples make of the loader; `reading`: `memfit.physics.loader.reading_bytes` of their largest picture."""
    figures = {name: np.array([getattr(cost, name) for cost in costs], dtype=np.int64) for name in LOADED}
    return load_from(prepared, figures, reading)


def load_from(prepared: Prepared, figures: Mapping[str, NDArray[np.int64]], reading: int) -> LoaderLoad:
    """As `load_of`, from the arrays of a scan."""
    micro = prepared.recipe.levers.micro_batch
    each = patch_bytes(prepared.family, prepared.source.config)
    return loader_load(figures, each, micro if isinstance(micro, int) else 1, reading)


def default_load(prepared: Prepared, recipe: Recipe, batch: TraceBatch) -> LoaderLoad:
    """Without data: the rows themselves, and pictures of the size that the recipe or the default says."""
    keys = recipe.workload if isinstance(recipe.workload, WorkloadKeys) else WorkloadKeys()
    pictures = batch.images or ((),) * len(batch.rows)
    costs = [
        SampleCost(tokens, 0, 0, sum(len(cost.crops) for cost in images), sum(cost.patches for cost in images))
        for tokens, images in zip(batch.rows, pictures, strict=True)
    ]
    width, height = map(int, (keys.image_size or DEFAULT_SIZE).split("x"))
    return load_of(prepared, costs, reading_bytes(width, height, "") if any(pictures) else 0)


def step_request(prepared: Prepared, rows: Sequence[Row] = ()) -> TraceRequest:
    """What is traced for a recipe. Raises as `forecast_plan` does."""
    forecast = estimate_states(prepared.recipe, prepared.profile, prepared.family, prepared.hardware)
    return _request(prepared, _counting(prepared, forecast), trace_batch(prepared, forecast.recipe, rows))


def _counting(prepared: Prepared, forecast: Forecast) -> Counting:
    resolved = resolve_parts(forecast.recipe, prepared.family, prepared.profile)
    groups = parameter_groups(prepared.profile, resolved, forecast.recipe.lora)
    return Counting(forecast.recipe, prepared.hardware, groups)


def _request(prepared: Prepared, counting: Counting, batch: TraceBatch) -> TraceRequest:
    return TraceRequest(
        family=prepared.family,
        config=prepared.source.config,
        recipe=as_it_runs(counting.recipe, counting),
        parts=resolve_parts(counting.recipe, prepared.family, prepared.profile),
        batch=batch,
        device="gpu" if prepared.hardware.gpu else "cpu",
        # Whole gradients wait for the next micro-batch; split ones are no part of a rank's own step.
        accumulated=counting.micro_batches > 1 and counting.layout.engine.keep_ways == 1,
        replaced=counting.strategy.replaces,
    )


def _traced(
    prepared: Prepared, forecast: Forecast, under: tuple[TraceBatch, LoaderLoad], made: dict[str, StepTrace]
) -> Forecast:
    """The forecast with the step of a batch `under` a loader's load."""
    recipe, gpu, (batch, load) = forecast.recipe, prepared.hardware.gpu, under
    counting = _counting(prepared, forecast)
    request = _request(prepared, counting, batch)
    key = key_of(prepared, request)
    capacity = gpu.capacity_bytes if gpu else 0
    engine = (recipe.engine, prepared.hardware.text, capacity, recipe.batch, _levers(recipe), SOURCE)
    replay_key = trace_key(key, engine) if gpu else key
    reserved = load_replay(replay_key) if gpu else None
    trace = step_trace(prepared, request, made, with_events=gpu is not None and reserved is None)
    stages = stages_of(prepared, counting, trace)
    if gpu and reserved is None:
        reserved = replay_steps(forecast, counting, trace, stages)
        store_replay(replay_key, reserved)
    found = with_trace(forecast, trace, reserved, stages, load)
    return with_speed(found, speed_of(counting, trace, batch))


def key_of(prepared: Prepared, request: TraceRequest) -> str:
    """The key of a traced step."""
    ways = (request.device, request.accumulated, *request.replaced)
    return trace_key(prepared.profile.key, _levers(request.recipe), ways, dataclasses.asdict(request.batch))


def step_trace(
    prepared: Prepared, request: TraceRequest, made: dict[str, StepTrace], with_events: bool = False
) -> StepTrace:
    """The step: made in this process, cached, shipped, played or traced, in this order; kept in `made` and the cache.

    Only what is played or traced now has events, which the allocator's replay needs.
    """
    key = key_of(prepared, request)
    trace = made.get(key) or load_trace(key)
    if trace is None or (with_events and not trace.events):
        with no_collection():
            trace = _played(prepared, request) or _run(request)
        trace = dataclasses.replace(trace, stretches=stretches(trace.events, locator(prepared.family)))
        store_trace(key, trace)
    made[key] = trace
    return trace


def tapes_key(profile: Profile, request: TraceRequest) -> str:
    """The key of the tapes of one step: they hold for any rows and tokens, with the same pictures in every row."""
    recipe = dataclasses.replace(request.recipe, levers=dataclasses.replace(request.recipe.levers, micro_batch=0))
    pictures = [dataclasses.asdict(cost) for cost in request.batch.images[0]] if request.batch.images else []
    ways = (request.device, request.accumulated, *request.replaced)
    return trace_key("tapes", profile.key, _levers(recipe), ways, pictures)


def _played(prepared: Prepared, request: TraceRequest) -> StepTrace | None:
    """The step without torch, where there are tapes that hold for its batch."""
    recording = played(load_tapes(tapes_key(prepared.profile, request)), request.batch)
    return step_of(recording, prepared.family) if recording is not None else None


def _run(request: TraceRequest) -> StepTrace:
    # Imported here: where numbers are cached or played, planning loads no torch.
    from memfit.trace.step import trace_step

    return trace_step(request)


def stages_of(prepared: Prepared, counting: Counting, trace: StepTrace) -> Stages:
    """A traced step's stretches beside what the engine does in each."""
    tied = {row.module: row.tied_to for row in prepared.profile.parameters if row.tied_to}
    return Stages(counting, trace.stretches, prepared.family.blocks, tied)


def as_it_runs(recipe: Recipe, counting: Counting) -> Recipe:
    """The recipe with the dtypes that a micro-batch meets while the engine runs it.

    Block-wise engines gather in the dtype of computation, so that there is nothing left to cast; and an engine that
    casts adapters gives them the dtype of the other parameters.
    """
    precision, levers, lora = counting.precision, recipe.levers, recipe.lora
    if counting.layout.engine.gather == "block" and precision.compute == "bfloat16":
        levers = dataclasses.replace(levers, precision="pure-bf16")
    if counting.precision.name in counting.strategy.casts_adapters:
        learning = precision.compute if counting.layout.engine.gather == "block" else precision.learning
        lora = dataclasses.replace(lora, dtype=SHORT[learning])
    if _computes_like(precision.name, "pure-bf16"):
        levers = dataclasses.replace(levers, precision="pure-bf16")
    levers = dataclasses.replace(levers, parallel="none", offload="none", offload_to="host", pin_memory=False)
    # Which optimizer steps, and how the allocator maps memory, is nothing of a micro-batch.
    levers = dataclasses.replace(levers, optimizer="adamw", allocator="default")
    return dataclasses.replace(recipe, levers=levers, lora=lora, engine={})


def _computes_like(name: str, other: str) -> bool:
    """Whether a micro-batch meets the same dtypes under two precisions: master weights are only in the step."""
    one, two = PRECISIONS[name], PRECISIONS[other]
    same = (one.learning, one.frozen, one.compute, one.autocast)
    return same == (two.learning, two.frozen, two.compute, two.autocast)


def _levers(recipe: Recipe) -> dict[str, object]:
    """What a trace and its replay depend on, beside the model and the batch."""
    return {
        "levers": dataclasses.asdict(recipe.levers),
        "parts": dict(recipe.parts),
        "lora": dataclasses.asdict(recipe.lora),
        "method": recipe.method,
    }


def trace_batch(prepared: Prepared, recipe: Recipe, rows: Sequence[Row]) -> TraceBatch:
    """The micro-batch that is traced: these rows, or the recipe's workload, or the documented default."""
    if rows:
        whole = recipe.levers.loss == "full-logits" or any(row.trained is None for row in rows)
        trained = () if whole else tuple(int(row.trained or 0) for row in rows)
        return TraceBatch(tuple(row.tokens for row in rows), tuple(row.images for row in rows), trained)
    keys = recipe.workload if isinstance(recipe.workload, WorkloadKeys) else WorkloadKeys()
    costs = _default_pictures(prepared, recipe, keys)
    least = sum(cost.tokens for cost in costs) + 16 * sum(len(cost.crops) for cost in costs)
    tokens, key = keys.tokens or max(DEFAULT_TOKENS, least), "workload.tokens"
    if recipe.max_length != "auto" and (keys.tokens is None or int(recipe.max_length) < tokens):
        tokens, key = int(recipe.max_length), "max_length"  # no sample is longer, and some may be as long
    pinned = keys.tokens is not None or key == "max_length"
    if pinned and tokens <= sum(cost.tokens for cost in costs):
        raise UserError(
            f"{key}: {tokens}, but its pictures alone take {sum(cost.tokens for cost in costs)}",
            f"{key}: {least}, or a smaller workload.image_size",
        )
    micro = int(recipe.levers.micro_batch)
    return TraceBatch((tokens,) * micro, (costs,) * micro)


def _default_pictures(prepared: Prepared, recipe: Recipe, keys: WorkloadKeys) -> tuple[ImageCost, ...]:
    if prepared.family.images is None:
        return ()
    width, height = map(int, (keys.image_size or DEFAULT_SIZE).split("x"))
    count = DEFAULT_IMAGES if keys.images is None else keys.images
    rule = prepared.family.images
    settings = rule.budget(prepared.source.config, prepared.source.preprocessor, recipe.image)
    return (rule.rule(settings, width, height),) * count
