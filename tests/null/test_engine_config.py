"""What an engine is told: every value explicit, and the ones that were priced."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from memfit.catalog.gpus import parse_hardware
from memfit.errors import UserError
from memfit.planner.estimate import estimate_states
from memfit.planner.plan import plan_of
from memfit.specs.plan import Plan
from memfit.specs.recipe import Levers, Recipe, Schedule
from memfit.strategies import STRATEGIES
from tests.null.hand_model import FAMILY, profile

LAYOUTS = [
    *(("ddp", "none"), ("fsdp", "none"), ("fsdp", "params+optimizer")),
    *((zero, offload) for zero in ("zero1", "zero2", "zero3") for offload in ("none", "optimizer")),
    ("zero3", "params+optimizer"),
]


def plan(parallel: Any, offload: Any = "none", precision: Any = "fp32", **keys: Any) -> Plan:
    levers = Levers(parallel=parallel, offload=offload, precision=precision, micro_batch=2)
    recipe = Recipe(model="hand", levers=levers, batch=16, schedule=Schedule(clip=0.5), **keys)
    return plan_of(estimate_states(recipe, profile(), FAMILY, parse_hardware("2xA100-40G")))


def config(*words: Any, **keys: Any) -> dict[str, Any]:
    made = plan(*words, **keys)
    return STRATEGIES[str(made.recipe.levers.parallel)].engine_config(made)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value


@pytest.mark.parametrize(("parallel", "offload"), LAYOUTS)
def test_no_value_is_left_to_the_engine(parallel: str, offload: str) -> None:
    found = list(leaves(config(parallel, offload)))
    assert found
    assert "auto" not in found


def test_batches_are_what_the_recipe_says() -> None:
    found = config("zero2")
    # 16 samples = 2 ranks x 2 a micro-batch x 4 micro-batches
    assert found["train_batch_size"] == 16
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 4
    assert found["gradient_clipping"] == 0.5


def test_the_numbers_are_those_that_were_priced() -> None:
    values = {"reduce_bucket_size": 1234, "stage3_prefetch_bucket_size": 77, "sub_group_size": 999}
    made = plan("zero3", engine={"zero": values})
    section = STRATEGIES["zero3"].engine_config(made)["zero_optimization"]
    assert {key: section[key] for key in values} == values
    assert made.layout.engine.bucket_elements == 1234
    assert made.layout.engine.prefetch_elements == 77
    assert made.layout.engine.step_elements == 999
    other = dataclasses.replace(made.layout, engine=dataclasses.replace(made.layout.engine, bucket_elements=4321))
    again = STRATEGIES["zero3"].engine_config(dataclasses.replace(made, layout=other))
    assert again["zero_optimization"]["reduce_bucket_size"] == 4321


@pytest.mark.parametrize(
    ("parallel", "offload", "optimizer", "parameters"),
    [
        ("zero2", "none", None, None),
        ("zero2", "optimizer", "cpu", None),
        ("zero3", "optimizer", "cpu", None),
        ("zero3", "params+optimizer", "cpu", "cpu"),
    ],
)
def test_what_is_offloaded(parallel: str, offload: str, optimizer: str | None, parameters: str | None) -> None:
    found = config(parallel, offload)
    section = found["zero_optimization"]
    assert section.get("offload_optimizer", {}).get("device") == optimizer
    assert section.get("offload_param", {}).get("device") == parameters
    assert found["zero_force_ds_cpu_optimizer"] is (optimizer is not None)
    if optimizer:
        assert section["offload_optimizer"]["pin_memory"] is True


@pytest.mark.parametrize(
    ("precision", "enabled", "width", "pure"),
    [("fp32", None, "fp32", False), ("bf16-mixed", "bf16", "bf16", False), ("pure-bf16", "bf16", "bf16", True)],
)
def test_dtypes(precision: str, enabled: str | None, width: str, pure: bool) -> None:
    found = config("zero2", "none", precision)
    assert [name for name in ("bf16", "fp16") if found[name]["enabled"]] == ([enabled] if enabled else [])
    assert found["data_types"]["grad_accum_dtype"] == width
    assert found["bf16"]["bf16_master_weights_and_grads"] is pure


def test_fsdp_computes_in_16_bit_and_reduces_in_the_dtype_of_its_shards() -> None:
    found = config("fsdp", "none", "bf16-mixed")
    assert (found["param_dtype"], found["reduce_dtype"]) == ("bfloat16", "float32")
    assert config("fsdp")["param_dtype"] is None
    assert config("fsdp", "params+optimizer")["cpu_offload"] is True


def test_ddp_takes_its_value() -> None:
    assert config("ddp")["gradient_as_bucket_view"] is False
    assert config("ddp", engine={"ddp": {"gradient_as_bucket_view": True}})["gradient_as_bucket_view"] is True
    with pytest.raises(UserError, match="says nothing to this engine"):
        config("ddp", engine={"zero": {"overlap_comm": True}})
