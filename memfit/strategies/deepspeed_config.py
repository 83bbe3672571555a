"""DeepSpeed's configuration of a plan under ZeRO, every value said outright: what was priced is what runs.

Read for DeepSpeed 0.19.8 (deepspeed.runtime.config, deepspeed.runtime.zero.config).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memfit.catalog.precisions import PRECISIONS
from memfit.specs.plan import Plan

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
NEVER = 2**31 - 1  # steps between DeepSpeed's own progress lines
# deepspeed.runtime.config_utils names dtypes so.
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Optimizers that DeepSpeed's own CPU Adam stands in for under offload.
CPU_ADAM = frozenset({"adamw", "adamw-foreach"})


def deepspeed_config(plan: Plan, values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an effective plan. `values`: `engine: {zero: ...}` with memfit's own where it is silent.

    Numbers that "auto" stands for are taken from the layout, which has worked them out.
    """
    recipe, ranks = plan.recipe, plan.forecast.hardware.ranks
    row, micro, batch = PRECISIONS[str(recipe.levers.precision)], int(recipe.levers.micro_batch), int(recipe.batch)
    pure = recipe.levers.precision == "pure-bf16"
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batch // (micro * ranks),
        "train_batch_size": batch,
        "gradient_clipping": recipe.schedule.clip,
        "prescale_gradients": False,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
        "dump_state": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": offloads(plan) and recipe.levers.optimizer in CPU_ADAM,
        "fp16": {
            "enabled": row.learning == "float16",
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "bf16": {
            "enabled": row.learning == "bfloat16",
            "bf16_master_weights_and_grads": pure,
            "bf16_optimizer_states": pure,
        },
        # Left out, both would follow the model's dtype; said, so that an upgrade cannot change them.
        "data_types": {"grad_accum_dtype": SHORT[row.learning]},
        "communication_data_type": SHORT[row.learning],
        "zero_optimization": _zero(plan, values),
    }


def offloads(plan: Plan) -> bool:
    """Whether the optimizer steps outside the GPU."""
    return plan.layout.home_optimizer != "gpu"


def _zero(plan: Plan, values: Mapping[str, Any]) -> dict[str, Any]:
    engine, stage = plan.layout.engine, STAGES[plan.layout.name]
    section: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": bool(values["overlap_comm"]),
        "reduce_bucket_size": engine.bucket_elements,
        "allgather_partitions": True,
        # Without effect where torch gathers in place (deepspeed.runtime.utils:all_gather_dp_groups), which it does.
        "allgather_bucket_size": engine.bucket_elements,
        "round_robin_gradients": False,
    }
    if offloads(plan):
        section["offload_optimizer"] = {
            "device": _device(plan.layout.home_optimizer),
            "pin_memory": plan.layout.pinned,
            "ratio": 1.0,
        }
    if stage < 3:
        return section
    if plan.layout.home_parameters != "gpu":
        section["offload_param"] = {"device": _device(plan.layout.home_parameters), "pin_memory": plan.layout.pinned}
    return section | {
        "sub_group_size": engine.step_elements,
        "stage3_prefetch_bucket_size": engine.prefetch_elements,
        "stage3_param_persistence_threshold": engine.persistent_elements,
        "stage3_max_live_parameters": engine.live_elements,
        "stage3_max_reuse_distance": engine.reuse_elements,
        # memfit gathers weights itself when it saves, tensor by tensor.
        "stage3_gather_16bit_weights_on_model_save": False,
    }


def _device(home: str) -> str:
    return {"host": "cpu", "nvme": "nvme"}[home]
