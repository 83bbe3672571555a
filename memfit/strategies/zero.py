"""DeepSpeed ZeRO, stages 1 to 3: how states are split, and the buffers beside them. Read for DeepSpeed 0.19.8."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from memfit.catalog.precisions import PRECISIONS
from memfit.specs.engine_numbers import EngineNumbers
from memfit.specs.plan import Layout, Plan
from memfit.strategies.base import Request, Strategy, engine_values, number
from memfit.strategies.deepspeed_config import deepspeed_config
from memfit.strategies.user_deepspeed import merged, zero_numbers

STAGE_1_AND_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
TRANSIENT = ("NCCL buffers",)
# What memfit writes into the configuration where the recipe's `engine: {zero: {...}}` says nothing: DeepSpeed's own
# literal defaults (deepspeed.runtime.zero.config:DeepSpeedZeroConfig), overlap_comm off because it doubles the bucket.
# transformers' "auto" is a value like others; a bucket of hidden^2 is orders smaller than 5e8.
# Values of stage 3 are taken, and move nothing, under the other stages: a configuration usually holds all of them.
VALUES: dict[str, Any] = {
    "reduce_bucket_size": int(5e8),
    "overlap_comm": False,
    "sub_group_size": int(1e9),
    "stage3_prefetch_bucket_size": int(5e7),
    "stage3_max_live_parameters": int(1e9),
    "stage3_max_reuse_distance": int(1e9),
    "stage3_param_persistence_threshold": int(1e5),
}
OPTIMIZER_ONLY = frozenset({("optimizer", "host")})
EVERYTHING = frozenset((what, where) for what in ("optimizer", "params+optimizer") for where in ("host", "nvme"))


def layout_1(request: Request) -> Layout:
    """Stage 1: whole gradients in `.grad` until backward has ended, then the owned slice in a buffer."""
    return Layout(
        name="zero1",
        split_optimizer=request.ranks,
        # Offloaded ones live in host memory as the optimizer steps them, this rank's share only.
        split_gradients=request.ranks if request.offload != "none" else 1,
        resident=("gradients",) if request.offload != "none" else (),
        gradient_copies=0 if request.offload != "none" else 1,
        whole_at_edges="" if request.offload != "none" else "gradient_copies",
        split_gradient_copies=request.ranks,
        engine=_buckets(request, keep_ways=1, reduce_late=True),
        gradients_end="backward",
        home_optimizer=request.home_optimizer,
        pinned=request.pin,
        source=f"{STAGE_1_AND_2}.reduce_ipg_grads and copy_grads_in_partition",
    )


def layout_2(request: Request) -> Layout:
    """Stage 2: of the gradients only the owned slice stays, in a buffer made when the first of them is reduced."""
    return Layout(
        name="zero2",
        split_gradients=request.ranks,
        split_optimizer=request.ranks,
        resident=("gradients",) if request.offload != "none" else (),
        whole_at_edges="" if request.offload != "none" else "gradients",
        engine=_buckets(request, keep_ways=0),
        home_optimizer=request.home_optimizer,
        pinned=request.pin,
        source=f"{STAGE_1_AND_2}.copy_grads_in_partition (grads_in_partition)",
    )


def layout_3(request: Request) -> Layout:
    """Stage 3: everything split tensor by tensor; the gradient partitions are one buffer that stays."""
    values = values_of(request.values)
    engine = EngineNumbers(
        keep_ways=0,
        bucket_elements=number(values, "reduce_bucket_size", request.hidden),
        bucket_width=request.width,
        buckets=1,
        bucket_stays=True,
        copy_when="uneven",
        ranks=request.ranks,
        gather="module",
        collective_copy=True,
        prefetch_elements=number(values, "stage3_prefetch_bucket_size", request.hidden),
        live_elements=number(values, "stage3_max_live_parameters", request.hidden),
        reuse_elements=number(values, "stage3_max_reuse_distance", request.hidden),
        persistent_elements=number(values, "stage3_param_persistence_threshold", request.hidden),
        step_copy_widths=() if request.offload != "none" else _step_copies(request),
        step_elements=number(values, "sub_group_size", request.hidden),
        gather_at_load=True,
        gather_at_save=True,
    )
    return Layout(
        name="zero3",
        split_parameters=request.ranks,
        split_gradients=request.ranks,
        split_optimizer=request.ranks,
        split_unit="tensor",
        resident=("gradients",),
        engine=engine,
        home_parameters=request.home_parameters,
        home_optimizer=request.home_optimizer,
        pinned=request.pin,
        source=f"{STAGE_3}.grad_partitions_flat_buffer",
    )


def values_of(engine: Mapping[str, Any]) -> dict[str, Any]:
    """The values in force of a recipe's `engine:`: memfit's own under its `zero`, or under a user's DeepSpeed file."""
    if "deepspeed" in engine:
        return engine_values("zero", VALUES, {"zero": zero_numbers(engine["deepspeed"])})
    return engine_values("zero", VALUES, engine)


def _config(plan: Plan) -> dict[str, Any]:
    engine = plan.recipe.engine
    own = deepspeed_config(plan, values_of(engine))
    return merged(own, engine["deepspeed"]) if "deepspeed" in engine else own


def _buckets(request: Request, keep_ways: int, reduce_late: bool = False) -> EngineNumbers:
    """Stages 1 and 2: one bucket, two with overlap_comm, from the first gradient to the end of backward."""
    values = values_of(request.values)
    offloads = request.offload != "none"
    return EngineNumbers(
        keep_ways=keep_ways,
        partition_ways=0 if offloads else request.ranks,
        partition_width=request.width,
        bucket_elements=number(values, "reduce_bucket_size", request.hidden),
        bucket_width=request.width,
        buckets=2 if values["overlap_comm"] else 1,
        copy_when="spans-ranks",
        reduce_late=reduce_late,
        ranks=request.ranks,
        step_copy_widths=() if offloads else _step_copies(request),
        load_copies=1,
        largest_gradient_buffers=1 if offloads else 0,
        # set_norm_for_param_grad_in_gpu, with deepspeed.runtime.zero.utils:get_norm_dtype: fp64.
        norm_width=8 if offloads else 0,
    )


def _step_copies(request: Request) -> tuple[int, ...]:
    """The own gradients flattened, and once more in the master weights' dtype where it is another.

    Source: stage_1_and_2 `step` (flatten of averaged_gradients, then `.to`), stage3 `_prepare_fp32_grad_for_sub_group`.
    """
    return (request.width,) if request.width == request.master_width else (request.width, request.master_width)


def _strategy(
    name: str, layout: Callable[[Request], Layout], source: str, values: dict[str, Any], offloads: frozenset[Any]
) -> Strategy:
    return Strategy(
        name=name,
        layout=layout,
        source=source,
        casts_adapters=frozenset(PRECISIONS),
        not_forecast=TRANSIENT,
        section="zero",
        values=values,
        offloads=offloads,
        engine_config=_config,
    )


ZERO1 = _strategy("zero1", layout_1, STAGE_1_AND_2, VALUES, OPTIMIZER_ONLY)
ZERO2 = _strategy("zero2", layout_2, STAGE_1_AND_2, VALUES, OPTIMIZER_ONLY)
ZERO3 = dataclasses.replace(
    _strategy("zero3", layout_3, STAGE_3, VALUES, EVERYTHING),
    replaces=("zero3-linear",),  # deepspeed.runtime.zero.partition_parameters:Init._enable_mem_efficient_linear
)
