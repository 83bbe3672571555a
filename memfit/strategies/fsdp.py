"""FSDP2 (fully_shard): each tensor split along its first dimension, blocks and the root gathered around their use."""

from __future__ import annotations

from typing import Any

from memfit.catalog.precisions import precision_under
from memfit.specs.engine_numbers import EngineNumbers
from memfit.specs.plan import Layout, Plan
from memfit.strategies.base import Request, Strategy, engine_values

SOURCE = "torch.distributed.fsdp:fully_shard (FSDPParam shards dimension 0 by chunks)"
# `reshard_root`: let the root's parameters go between forward and backward. fully_shard keeps them by itself
# (reshard_after_forward left out). Every micro-batch reduces its gradients, so that they stay split.
VALUES: dict[str, Any] = {"reshard_root": False}


def layout(request: Request) -> Layout:
    values = engine_values("fsdp", VALUES, request.values)
    return Layout(
        name="fsdp",
        split_parameters=request.ranks,
        split_gradients=request.ranks,
        split_optimizer=request.ranks,
        split_unit="rows",
        engine=EngineNumbers(
            keep_ways=request.ranks,
            keep_width=request.width,
            ranks=request.ranks,
            gather="block",
            collective_copy=True,
            root_stays=not values["reshard_root"],
            # Gradients are reduced in the dtype of the shards: fp32 under amp and mixed, else that of the model.
            scatter_width=request.width,
            gather_at_load=True,
            gather_at_save=True,
        ),
        home_parameters="host" if request.offload != "none" else "gpu",
        home_optimizer="host" if request.offload != "none" else "gpu",
        pinned=request.pin,
        source=SOURCE,
    )


def engine_config(plan: Plan) -> dict[str, Any]:
    """The arguments of fully_shard by accelerate's words; dtypes are torch's names, None leaves a tensor's own.

    Gradients are summed in the dtype of the shards, as the layout's `scatter_width` says.
    """
    row = precision_under(str(plan.recipe.levers.precision), "fsdp")
    computes_otherwise = row.compute != row.learning
    return {
        "version": 2,
        "reshard_after_forward": True,
        "cpu_offload": plan.layout.home_parameters == "host",
        "pin_memory": plan.layout.pinned,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "cpu_ram_efficient_loading": plan.forecast.hardware.ranks > 1,
        "state_dict_type": "FULL_STATE_DICT",
        "activation_checkpointing": False,
        "param_dtype": row.compute if computes_otherwise else None,
        "reduce_dtype": row.learning if computes_otherwise else None,
    }


FSDP = Strategy(
    name="fsdp",
    layout=layout,
    source=SOURCE,
    casts_adapters=frozenset({"bf16-amp", "bf16-mixed"}),
    not_forecast=("NCCL buffers",),
    section="fsdp",
    values=VALUES,
    offloads=frozenset({("params+optimizer", "host")}),
    engine_config=engine_config,
)
