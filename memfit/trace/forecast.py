"""The forecast of a prepared recipe: states, then one traced micro-batch of the worst batch, then the allocator."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from memfit.errors import UserError
from memfit.inputs.trace_cache import load_replay, load_trace, store_replay, store_trace, trace_key
from memfit.planner.activations import with_trace
from memfit.planner.counting import LORA_DTYPES, Counting
from memfit.planner.engine_stages import Stages
from memfit.planner.estimate import estimate_states
from memfit.planner.parts import parameter_groups, resolve_parts
from memfit.planner.plan import plan_of
from memfit.planner.replay import SOURCE, replay_steps
from memfit.specs.plan import Forecast, Plan
from memfit.specs.recipe import Recipe, WorkloadKeys
from memfit.specs.sample import Sample
from memfit.specs.trace import Device, Row, StepTrace, TraceBatch
from memfit.specs.workload import ImageCost, SampleCost
from memfit.trace.prepare import Prepared

if TYPE_CHECKING:
    from memfit.inputs.encode import Encoder

# The documented worst sample where there is no data (docs/recipe.md).
DEFAULT_TOKENS, DEFAULT_IMAGES, DEFAULT_SIZE = 2048, 1, "1344x1344"
# Layouts under which a micro-batch runs on one rank as the trace has it.
TRACED_LAYOUTS = ("none", "ddp", "zero1", "zero2", "zero3", "fsdp")
SHORT: dict[str, Any] = {full: short for short, full in LORA_DTYPES.items()}


def forecast_plan(prepared: Prepared, rows: Sequence[Row] = ()) -> Plan:
    """The plan with its forecast. `rows` are the worst micro-batch; without them the recipe's workload, or the
    documented default, stands in.

    Raises UserError with everything that does not go together, and for a workload whose pictures do not fit its tokens.
    """
    forecast = estimate_states(prepared.recipe, prepared.profile, prepared.family, prepared.hardware)
    effective = forecast.recipe
    # DoRA unpacks a 4-bit weight for its norm; that has no stand-in yet.
    dora_on_four_bit = effective.method == "qlora" and effective.lora.variant == "dora"
    if effective.levers.parallel not in TRACED_LAYOUTS or dora_on_four_bit:
        return plan_of(forecast)
    batch = _batch(prepared, forecast.recipe, rows)
    return plan_of(_traced(prepared, forecast, batch))


def worst_rows(samples: Sequence[Sample], costs: Sequence[SampleCost], encoder: Encoder, micro: int) -> tuple[Row, ...]:
    """The `micro` longest samples, longest first, the one with more patches among equals: the worst micro-batch."""
    # Imported here: a forecast without data reads no pictures, and answers sooner for it.
    from memfit.inputs.data.images import read_size

    longest = sorted(range(len(costs)), key=lambda index: (-costs[index].tokens, -costs[index].patches))[:micro]
    rows = []
    for index in longest:
        sample = samples[index]
        encoded = encoder.encode(sample, [read_size(path) for path in sample.images])
        rows.append(Row(len(encoded.input_ids), encoded.image_costs, costs[index].trained_tokens))
    return tuple(rows)


def _traced(prepared: Prepared, forecast: Forecast, batch: TraceBatch) -> Forecast:
    recipe = forecast.recipe
    resolved = resolve_parts(recipe, prepared.family, prepared.profile)
    groups = parameter_groups(prepared.profile, resolved, recipe.lora)
    counting = Counting(recipe, prepared.hardware, groups)
    device: Device = "gpu" if prepared.hardware.gpu else "cpu"
    # Whole gradients wait for the next micro-batch; split ones are no part of a rank's own step.
    accumulated = counting.micro_batches > 1 and counting.layout.engine.keep_ways == 1
    runs = as_it_runs(recipe, counting)
    key = trace_key(prepared.profile.key, _levers(runs), (device, accumulated), dataclasses.asdict(batch))
    gpu = prepared.hardware.gpu
    capacity = gpu.capacity_bytes if gpu else 0
    engine = (recipe.engine, prepared.hardware.text, capacity, recipe.batch, _levers(recipe), SOURCE)
    replay_key = trace_key(key, engine) if prepared.hardware.gpu else key
    trace, reserved = load_trace(key), load_replay(replay_key) if prepared.hardware.gpu else None
    if trace is None or (reserved is None and prepared.hardware.gpu):
        # Imported here: with both in the cache, planning loads no torch.
        from memfit.trace.step import TraceRequest, locator, trace_step
        from memfit.trace.stretches import stretches

        request = TraceRequest(
            family=prepared.family,
            config=prepared.source.config,
            recipe=runs,
            parts=resolved,
            batch=batch,
            device=device,
            accumulated=accumulated,
        )
        fresh = trace_step(request)
        fresh = dataclasses.replace(fresh, stretches=stretches(fresh.events, locator(prepared.family)))
        stages = _stages(prepared, counting, fresh)
        replayed = replay_steps(forecast, counting, fresh, stages) if prepared.hardware.gpu else None
        store_trace(key, fresh)
        if replayed is not None:
            store_replay(replay_key, replayed)
        return with_trace(forecast, fresh, replayed, stages)
    return with_trace(forecast, trace, reserved, _stages(prepared, counting, trace))


def _stages(prepared: Prepared, counting: Counting, trace: StepTrace) -> Stages:
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
    same = ("none", "ddp")
    parallel = levers.parallel if levers.parallel in same else "none"
    levers = dataclasses.replace(levers, parallel=parallel, offload="none", offload_to="host", pin_memory=False)
    return dataclasses.replace(recipe, levers=levers, lora=lora, engine={})


def _levers(recipe: Recipe) -> dict[str, object]:
    """What a trace and its replay depend on, beside the model and the batch."""
    return {
        "levers": dataclasses.asdict(recipe.levers),
        "parts": dict(recipe.parts),
        "lora": dataclasses.asdict(recipe.lora),
        "method": recipe.method,
    }


def _batch(prepared: Prepared, recipe: Recipe, rows: Sequence[Row]) -> TraceBatch:
    if rows:
        whole = recipe.levers.loss == "full-logits" or any(row.trained is None for row in rows)
        trained = () if whole else tuple(int(row.trained or 0) for row in rows)
        return TraceBatch(tuple(row.tokens for row in rows), tuple(row.images for row in rows), trained)
    keys = recipe.workload if isinstance(recipe.workload, WorkloadKeys) else WorkloadKeys()
    costs = _default_pictures(prepared, recipe, keys)
    least = sum(cost.tokens for cost in costs) + 16 * sum(len(cost.crops) for cost in costs)
    tokens = keys.tokens or max(DEFAULT_TOKENS, least)
    if keys.tokens is not None and tokens <= sum(cost.tokens for cost in costs):
        raise UserError(
            f"workload.tokens: {tokens}, but its pictures alone take {sum(cost.tokens for cost in costs)}",
            f"workload.tokens: {least}, or a smaller workload.image_size",
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
