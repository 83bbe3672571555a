"""A user's own DeepSpeed file: priced as it says, every key without effect named, every contradiction at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memfit.catalog.deepspeed_keys import shipped_keys
from memfit.catalog.gpus import parse_hardware
from memfit.errors import UserError
from memfit.inputs.deepspeed_file import read_deepspeed_file
from memfit.inputs.recipe_file import override, recipe_from
from memfit.planner.estimate import estimate_states
from memfit.planner.plan import plan_json, plan_of
from memfit.planner.user_engine import check_deepspeed_file, remarks, with_users_deepspeed
from memfit.specs.deepspeed_file import DeepSpeedCheck
from memfit.specs.plan import Plan
from memfit.specs.recipe import Levers, Recipe, Schedule
from memfit.strategies import STRATEGIES
from tests.null.hand_model import FAMILY, profile

CARDS = parse_hardware("2xA100-40G")
# As files of many projects begin: transformers fills these in.
AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
}


def file(tmp_path: Path, zero: dict[str, Any] | None = None, **top: Any) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**AUTO, "zero_optimization": {"stage": 2, **(zero or {})}, **top}))
    return path


def recipe(path: Path, **keys: Any) -> Recipe:
    return Recipe(model="hand", engine={"deepspeed": str(path)}, **keys)


def plan(path: Path, **keys: Any) -> Plan:
    return plan_of(estimate_states(with_users_deepspeed(recipe(path, **keys), CARDS), profile(), FAMILY, CARDS))


def check(path: Path, **keys: Any) -> DeepSpeedCheck:
    return check_deepspeed_file(path, Recipe(model="hand", **keys), 2)[0]


def said(found: DeepSpeedCheck, kind: Any) -> dict[str, str]:
    return {finding.key: f"{finding.problem} | {finding.hint}" for finding in found.of(kind)}


# ── price ──


def test_the_files_numbers_are_priced(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        {
            "stage": 3,
            "reduce_bucket_size": 1234,
            "sub_group_size": 999.0,
            "prefetch_bucket_size": 77,
            "stage3_max_live_parameters": 5e4,
            "stage3_max_reuse_distance": 6000,
            "param_persistence_threshold": 11,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "offload_param": {"device": "cpu", "pin_memory": False},
        },
    )
    made = plan(path)
    engine, levers = made.layout.engine, made.recipe.levers
    numbers = (engine.bucket_elements, engine.prefetch_elements, engine.persistent_elements, engine.live_elements)
    assert numbers == (1234, 77, 11, 50_000)
    assert engine.reuse_elements == 6000
    assert (levers.parallel, levers.offload, levers.offload_to) == ("zero3", "params+optimizer", "host")
    assert levers.pin_memory is False
    assert (made.layout.home_parameters, made.layout.home_optimizer) == ("host", "host")


def test_a_file_is_priced_as_the_same_values_in_the_recipe(tmp_path: Path) -> None:
    zero = {"reduce_bucket_size": 1000, "sub_group_size": 50}
    levers = Levers(parallel="zero3", precision="bf16-mixed")
    own = Recipe(model="hand", levers=levers, engine={"zero": {**zero, "overlap_comm": True}})
    one = estimate_states(own, profile(), FAMILY, CARDS)
    other = plan(file(tmp_path, {"stage": 3, **zero})).forecast
    assert other.ledger == one.ledger
    assert other.layout == one.layout
    assert plan(file(tmp_path, {"stage": 3, **zero, "sub_group_size": 100_000})).forecast.ledger != one.ledger


def test_auto_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    """Three numbers of the hidden size (64 here), two of them under stage 3 only; DeepSpeed's default elsewhere."""
    auto = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "sub_group_size")
    three = plan(file(tmp_path, {"stage": 3, **dict.fromkeys(auto, "auto")})).layout.engine
    hidden = next(row.shape[1] for row in profile().parameters if row.kind == "embedding")
    assert three.bucket_elements == hidden * hidden
    assert three.prefetch_elements == int(0.9 * hidden * hidden)
    assert three.persistent_elements == 10 * hidden
    assert three.step_elements == 10**9
    made = plan(file(tmp_path, {"stage": 2, **dict.fromkeys(auto, "auto")}))
    assert made.layout.engine.bucket_elements == hidden * hidden
    section = STRATEGIES["zero2"].engine_config(made)["zero_optimization"]
    assert "auto" not in json.dumps(section)


def test_overlap_is_deepspeeds_own_default_where_the_file_is_silent(tmp_path: Path) -> None:
    """memfit's own default is off; a file that says nothing means on under stage 3, off below."""
    assert plan(file(tmp_path, {"overlap_comm": True})).layout.engine.buckets == 2
    assert plan(file(tmp_path)).layout.engine.buckets == 1
    for stage, overlaps in ((2, False), (3, True)):
        made = plan(file(tmp_path, {"stage": stage}))
        assert STRATEGIES[f"zero{stage}"].engine_config(made)["zero_optimization"]["overlap_comm"] is overlaps


@pytest.mark.parametrize(
    ("blocks", "precision"),
    [
        ({"bf16": {"enabled": True}}, "bf16-mixed"),
        ({"bf16": {"enabled": "auto"}}, "bf16-mixed"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "bf16-mixed"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": True}}, "fp16-mixed"),
        ({"bf16": {"enabled": False}}, "fp32"),
        ({"bf16": None}, "fp32"),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
            "pure-bf16",
        ),
    ],
)
def test_the_precision_is_the_files(tmp_path: Path, blocks: dict[str, Any], precision: str) -> None:
    assert plan(file(tmp_path, **blocks)).recipe.levers.precision == precision


def test_batches_are_the_files(tmp_path: Path) -> None:
    made = plan(file(tmp_path, train_batch_size=24, train_micro_batch_size_per_gpu=3))
    assert (made.recipe.batch, made.recipe.levers.micro_batch) == (24, 3)
    made = plan(file(tmp_path, gradient_accumulation_steps=5, train_micro_batch_size_per_gpu=3))
    assert made.recipe.batch == 5 * 3 * 2
    assert plan(file(tmp_path), batch=6).recipe.batch == 6


# ── what runs ──


def test_what_runs_is_the_file_with_its_gaps_filled(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        {"reduce_bucket_size": 1234, "enable_sanity_checks": True, "offload_param": {"device": "none"}},
        steps_per_print=10,
        fp16={"enabled": False, "initial_scale_power": 12},
        optimizer={"type": "AdamW", "params": {"lr": "auto"}},
        scheduler={"type": "WarmupCosineLR", "params": {}},
        nobody_reads_this=1,
    )
    made = plan(path, batch=8, schedule=Schedule(clip=0.5))
    config = STRATEGIES["zero2"].engine_config(made)
    assert (config["steps_per_print"], config["fp16"]["initial_scale_power"]) == (10, 12)
    assert config["fp16"]["loss_scale_window"] == 1000
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (8, 4)
    assert (config["gradient_clipping"], config["bf16"]["enabled"]) == (0.5, True)
    assert config["zero_optimization"]["reduce_bucket_size"] == 1234
    assert config["zero_optimization"]["enable_sanity_checks"] is True
    assert not {"optimizer", "scheduler", "nobody_reads_this"} & config.keys()
    assert "offload_param" not in config["zero_optimization"]
    assert "auto" not in json.dumps(config)


def test_a_plan_needs_the_file_no_more(tmp_path: Path) -> None:
    """The ranks read plan.json: the content is in it, and reading it again changes nothing."""
    path = file(tmp_path, {"stage": 3, "reduce_bucket_size": 1234}, train_micro_batch_size_per_gpu=2)
    made = plan(path)
    path.unlink()
    again = recipe_from(json.loads(json.dumps(plan_json(made)["recipe"])))
    assert with_users_deepspeed(again, CARDS) == again
    other = plan_of(estimate_states(again, profile(), FAMILY, CARDS))
    assert STRATEGIES["zero3"].engine_config(other) == STRATEGIES["zero3"].engine_config(made)
    assert other.forecast.ledger == made.forecast.ledger
    # `--set` on such a run keeps working.
    assert override(again, ["schedule.epochs=1"]).engine == again.engine


# ── keys ──


def test_keys_without_effect_are_named(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        {
            "stage": 3,
            "allgather_bucket_size": 5e8,
            "offload_optimizer": {"device": "none"},
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        offload_param={"device": "cpu"},
        reduce_bucket_size=5e8,
        activation_checkpointing={"partition_activations": True},
        aio={"block_size": 1048576},
        zero_force_ds_cpu_optimizer=True,
        wall_clock_breakdwon=True,
    )
    found = check(path)
    assert found.verdict == "ok"
    idle = said(found, "no-effect")
    assert "it belongs into zero_optimization" in idle["offload_param"]
    assert "it belongs into zero_optimization" in idle["reduce_bucket_size"]
    assert "did you mean wall_clock_breakdown?" in idle["wall_clock_breakdwon"]
    assert "module by module" in idle["zero_optimization.allgather_bucket_size"]
    assert "device none" in idle["zero_optimization.offload_optimizer"]
    assert "levers.checkpointing" in idle["activation_checkpointing"]
    assert {"aio", "zero_force_ds_cpu_optimizer"} <= idle.keys()
    assert "zero_optimization.stage3_gather_16bit_weights_on_model_save" in idle
    assert len(idle) == 9, idle
    assert len(remarks(recipe(path), CARDS)) == 9


def test_keys_of_stage_3_do_nothing_below(tmp_path: Path) -> None:
    zero = {"sub_group_size": 1e9, "stage3_max_live_parameters": 1e9, "offload_param": {"device": "cpu"}}
    idle = said(check(file(tmp_path, zero)), "no-effect")
    assert all("stage 2" in idle[f"zero_optimization.{key}"] for key in zero)


def test_what_deepspeed_refuses_is_an_error(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        {"reduce_bucket_sise": 1, "train_batch_size": 8, "mics_shard_size": 2},
        elasticity={"enabled": True},
        bf16=True,
        steps_per_print="auto",
    )
    wrong = said(check(path), "error")
    assert "did you mean reduce_bucket_size?" in wrong["zero_optimization.reduce_bucket_sise"]
    assert "it belongs to the top level" in wrong["zero_optimization.train_batch_size"]
    assert "has it no more" in wrong["zero_optimization.mics_shard_size"]
    assert "has it no more" in wrong["elasticity"]
    assert "is a section" in wrong["bf16"]
    assert "filled in by nobody" in wrong["steps_per_print"]
    assert len(wrong) == 6


def test_a_misspelt_key_hides_no_other_error(tmp_path: Path) -> None:
    path = file(tmp_path, {"stage": 4, "reduce_bucket_sise": 1}, train_batch_size=3)
    assert said(check(path, batch=8), "error").keys() >= {
        "zero_optimization.stage",
        "zero_optimization.reduce_bucket_sise",
        "train_batch_size",
    }


@pytest.mark.parametrize("value", ["yes", "true", 1])
def test_a_switch_is_true_or_false(tmp_path: Path, value: Any) -> None:
    """pydantic takes these for true, and memfit would have priced fp32 and unpinned memory."""
    moved = {"offload_optimizer": {"device": "cpu", "pin_memory": value}}
    wrong = said(check(file(tmp_path, moved, bf16={"enabled": value})), "error")
    assert wrong.keys() == {"bf16.enabled", "zero_optimization.offload_optimizer.pin_memory"}
    assert "is not true or false" in wrong["bf16.enabled"]


@pytest.mark.parametrize("key", ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"])
@pytest.mark.parametrize("value", ["8", 0, 2.5, True])
def test_batches_are_counts(tmp_path: Path, key: str, value: Any) -> None:
    assert key in said(check(file(tmp_path, **{key: value})), "error")


def test_old_spellings_are_understood_and_told(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"bfloat16": {"enabled": True}, "zero_optimization": {"stage": 2, "cpu_offload": True}}))
    found = check(path)
    assert {"bfloat16", "zero_optimization.cpu_offload"} <= said(found, "note").keys()
    assert (found.values["levers.precision"], found.values["levers.offload"]) == ("bf16-mixed", "optimizer")


@pytest.mark.parametrize(
    ("zero", "top", "key"),
    [
        ({"stage": 0}, {}, "zero_optimization.stage"),
        ({"stage": 4}, {}, "zero_optimization.stage"),
        ({"zero_quantized_weights": True}, {}, "zero_optimization.zero_quantized_weights"),
        ({"zero_hpz_partition_size": 2}, {}, "zero_optimization.zero_hpz_partition_size"),
        ({"contiguous_gradients": False}, {}, "zero_optimization.contiguous_gradients"),
        ({"reduce_bucket_size": "large"}, {}, "zero_optimization.reduce_bucket_size"),
        ({"overlap_comm": 1}, {}, "zero_optimization.overlap_comm"),
        ({"offload_optimizer": {"device": "gpu"}}, {}, "zero_optimization.offload_optimizer.device"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, {}, "zero_optimization.offload_param"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, {}, "zero_optimization.offload_optimizer.ratio"),
        ({}, {"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled"),
        ({}, {"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states"),
        ({}, {"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({}, {"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({}, {"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
        ({}, {"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": True}}, "data_types.grad_accum_dtype"),
        ({}, {"communication_data_type": "fp16", "bf16": {"enabled": True}}, "communication_data_type"),
    ],
)
def test_what_has_no_price_is_refused(tmp_path: Path, zero: dict[str, Any], top: dict[str, Any], key: str) -> None:
    assert list(said(check(file(tmp_path, zero, **top)), "error")) == [key]


@pytest.mark.parametrize(("dtype", "refused"), [("bf16", False), ("fp32", True), ("fp16", True)])
def test_a_dtype_must_be_that_of_a_precision_that_may_be_meant(tmp_path: Path, dtype: str, refused: bool) -> None:
    """bf16-mixed or pure-bf16: the recipe leaves it open, and fp32 gradients have no price under either."""
    path = file(tmp_path, data_types={"grad_accum_dtype": dtype}, bf16={"enabled": True})
    found = check_deepspeed_file(path, recipe(path, levers=Levers()), 2, shipped_keys())[0]
    told = said(found, "error")
    assert ("data_types.grad_accum_dtype" in told) is refused


def test_deepspeeds_defaults_said_outright_are_fine(tmp_path: Path) -> None:
    zero = {"contiguous_gradients": True, "reduce_scatter": True, "round_robin_gradients": False, "stage": 3}
    found = check(file(tmp_path, zero, torch_autocast={"enabled": False}, tensor_parallel={"autotp_size": 1}))
    assert found.verdict == "ok", found.text()


# ── against the recipe ──


def test_every_contradiction_at_once_each_with_its_change(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        {"offload_optimizer": {"device": "cpu"}},
        train_batch_size=32,
        gradient_clipping=0.3,
        bf16={"enabled": True},
        optimizer={"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": "auto"}},
        scheduler={"type": "WarmupDecayLR", "params": {"warmup_num_steps": 100}},
    )
    levers = Levers(parallel="zero3", offload="none", precision="fp32", micro_batch=2)
    with pytest.raises(UserError) as caught:
        plan(path, levers=levers, batch=16, schedule=Schedule(clip=1.0, learning_rate=1e-5))
    text = str(caught.value)
    for words in (
        "8 settings do not go together",
        "zero_optimization.stage: zero2, the recipe says zero3 (levers.parallel: auto)",
        "offload optimizer, the recipe says none",
        "they mean bf16-mixed, the recipe says fp32",
        "gives batch 32 on 2 ranks, the recipe says 16",
        "gradient_clipping: 0.3, the recipe says 1.0 (schedule.clip: 0.3)",
        "optimizer.params.lr: 0.0003, the recipe says 1e-05",
        "optimizer.params.betas: [0.9, 0.95], the recipe says [0.9, 0.999]",
        "WarmupDecayLR is linear once it is warm, the recipe says cosine",
    ):
        assert words in text, text
    assert len(text.splitlines()) == 8 + 3


def test_a_schedule_block_that_agrees_is_replaced_and_said(tmp_path: Path) -> None:
    block = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-4, "warmup_num_steps": "auto", "warmup_min_lr": "auto"}}
    path = file(tmp_path, scheduler=block, optimizer={"type": "Adam", "params": {"lr": 1e-4}})
    schedule = Schedule(kind="constant", learning_rate=1e-4)
    found = check(path, schedule=schedule)
    assert found.verdict == "ok"
    assert "not logarithmic" in said(found, "no-effect")["scheduler"]
    assert "optimizer" in said(found, "no-effect")
    wrong = said(check(path, schedule=Schedule(kind="constant", learning_rate=2e-4)), "error")
    assert set(wrong) == {"optimizer.params.lr", "scheduler.params.warmup_max_lr"}


def test_sums_of_the_file_itself(tmp_path: Path) -> None:
    path = file(tmp_path, train_batch_size=32, train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=2)
    assert "32 is not 4 x 2 accumulated x 2 ranks" in said(check(path), "error")["train_batch_size"]
    assert check_deepspeed_file(path, None, 4)[0].verdict == "ok"


def test_two_sources_for_one_number(tmp_path: Path) -> None:
    wanted = Recipe(model="hand", engine={"zero": {"sub_group_size": 5}, "deepspeed": str(file(tmp_path))})
    with pytest.raises(UserError, match="engine\\.zero says such values too"):
        with_users_deepspeed(wanted, CARDS)


def test_what_is_left_to_the_recipe_is_said(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    found = check(path, schedule=Schedule(clip=0.7))
    assert "0.7 is used" in said(found, "note")["gradient_clipping"]
    assert found.values["levers.precision"] == "fp32"
    assert "fp32" in found.text()


# ── the file as such ──


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"zero_optimization": {"stage": 2,}}', "not JSON"),
        ("[1]", "no keys with values"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "enabled stands there twice"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=problem):
        read_deepspeed_file(tmp_path / "ds.json")
    with pytest.raises(UserError, match="no DeepSpeed file"):
        read_deepspeed_file(tmp_path / "missing.json")


def test_a_recipe_without_a_file_is_left_alone() -> None:
    plain = Recipe(model="hand", engine={"zero": {"sub_group_size": 5}})
    assert with_users_deepspeed(plain, CARDS) is plain
    assert remarks(plain, CARDS) == []


def test_the_shipped_list_knows_the_usual_keys() -> None:
    keys = shipped_keys()
    assert {"zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "train_batch_size"} <= keys.sections[
        ""
    ].keys()
    assert "zero_optimization.offload_optimizer" in keys.closed
    assert keys.sections["zero_optimization"]["reduce_bucket_size"] == 5 * 10**8
