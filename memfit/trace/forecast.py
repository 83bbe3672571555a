"""The forecast of a prepared recipe: states, then one traced micro-batch of the worst batch, then the allocator."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from memfit.errors import UserError
from memfit.inputs.data.images import read_size
from memfit.inputs.encode import Encoder
from memfit.inputs.trace_cache import load_trace, store_trace, trace_key
from memfit.planner.activations import with_trace
from memfit.planner.estimate import estimate_states
from memfit.planner.parts import parameter_groups, resolve_parts
from memfit.planner.plan import plan_of
from memfit.planner.replay import replay_steps
from memfit.specs.plan import Forecast, Plan
from memfit.specs.recipe import Recipe, WorkloadKeys
from memfit.specs.sample import Sample
from memfit.specs.trace import Device, TraceBatch
from memfit.specs.workload import ImageCost, SampleCost
from memfit.trace.prepare import Prepared

# The documented worst sample where there is no data (docs/recipe.md).
DEFAULT_TOKENS, DEFAULT_IMAGES, DEFAULT_SIZE = 2048, 1, "1344x1344"
# Layouts under which a micro-batch runs on one rank as the trace has it.
TRACED_LAYOUTS = ("none", "ddp")
Row = tuple[int, tuple[ImageCost, ...]]


def forecast_plan(prepared: Prepared, rows: Sequence[Row] = ()) -> Plan:
    """The plan with its forecast. `rows` are the worst micro-batch: (tokens, pictures) of each row; without them the
    recipe's workload, or the documented default, stands in.

    Raises UserError with everything that does not go together, and for a workload whose pictures do not fit its tokens.
    """
    forecast = estimate_states(prepared.recipe, prepared.profile, prepared.family, prepared.hardware)
    if forecast.recipe.levers.parallel not in TRACED_LAYOUTS or forecast.recipe.method == "qlora":
        return plan_of(forecast)
    batch = _batch(prepared, forecast.recipe, rows)
    return plan_of(_traced(prepared, forecast, batch))


def worst_rows(samples: Sequence[Sample], costs: Sequence[SampleCost], encoder: Encoder, micro: int) -> tuple[Row, ...]:
    """The `micro` longest samples, longest first: the micro-batch that decides the peak."""
    longest = sorted(range(len(costs)), key=lambda index: -costs[index].tokens)[:micro]
    rows = []
    for index in longest:
        sample = samples[index]
        encoded = encoder.encode(sample, [read_size(path) for path in sample.images])
        rows.append((len(encoded.input_ids), encoded.image_costs))
    return tuple(rows)


def _traced(prepared: Prepared, forecast: Forecast, batch: TraceBatch) -> Forecast:
    recipe = forecast.recipe
    resolved = resolve_parts(recipe, prepared.family, prepared.profile)
    device: Device = "gpu" if prepared.hardware.gpu else "cpu"
    several = int(recipe.batch) > prepared.hardware.ranks * int(recipe.levers.micro_batch)
    key = trace_key(prepared.profile.key, _levers(recipe), (device, several), dataclasses.asdict(batch))
    found = load_trace(key)
    if found is not None:
        return with_trace(forecast, *found)
    # Imported here: with the trace in the cache, planning loads no torch.
    from memfit.trace.step import TraceRequest, trace_step

    request = TraceRequest(
        family=prepared.family,
        config=prepared.source.config,
        recipe=recipe,
        parts=resolved,
        batch=batch,
        device=device,
        accumulated=several,
    )
    trace = trace_step(request)
    groups = parameter_groups(prepared.profile, resolved, recipe.lora)
    reserved = replay_steps(forecast, groups, trace) if prepared.hardware.gpu else None
    store_trace(key, trace, reserved)
    return with_trace(forecast, trace, reserved)


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
        return TraceBatch(tuple(tokens for tokens, _ in rows), tuple(images for _, images in rows))
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
