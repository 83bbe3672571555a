"""The documented defaults, and every refusal with its change."""

from __future__ import annotations

from typing import Any

import pytest

from memfit.catalog.gpus import parse_hardware
from memfit.errors import UserError
from memfit.planner.defaults import micro_batches, resolve
from memfit.specs.hardware import Hardware
from memfit.specs.recipe import HardwareKeys, Levers, Lora, Recipe
from memfit.specs.workload import SampleCost, Workload
from tests.null.hand_model import FAMILY, profile


def effective(gpus: str, **keys: Any) -> tuple[Recipe, tuple[str, ...]]:
    return resolve(Recipe(model="m", **keys), parse_hardware(gpus), FAMILY, profile())


def refused(gpus: str, **keys: Any) -> UserError:
    with pytest.raises(UserError) as error:
        effective(gpus, **keys)
    return error.value


@pytest.mark.parametrize(
    ("gpus", "method", "parallel", "precision"),
    [
        ("1xRTX3090", "full", "auto", "bf16-amp"),
        ("2xRTX3090", "full", "auto", "bf16-amp"),
        ("1xRTX3090", "lora", "auto", "pure-bf16"),
        ("1xRTX3090", "qlora", "auto", "pure-bf16"),
        ("8xA100-40G", "full", "zero2", "bf16-mixed"),
        ("8xA100-40G", "lora", "zero3", "bf16-mixed"),
        ("8xA100-40G", "full", "fsdp", "bf16-amp"),
        ("1xT4", "full", "auto", "fp16-amp"),
        ("1xV100-32G", "lora", "auto", "fp16-amp"),
        ("8xV100-32G", "full", "zero3", "fp16-mixed"),
        ("2xcpu", "full", "auto", "bf16-amp"),
    ],
)
def test_default_precision(gpus: str, method: Any, parallel: Any, precision: str) -> None:
    recipe, _ = effective(gpus, method=method, levers=Levers(parallel=parallel))
    assert recipe.levers.precision == precision
    # Under FSDP2 modules compute in 16 bit without autocast, whatever the name.
    assert recipe.levers.autocast is (precision.endswith("-amp") and parallel != "fsdp")


def test_documented_defaults() -> None:
    recipe, defaults = effective("2xRTX3090")
    levers = recipe.levers
    assert (levers.optimizer, levers.checkpointing, levers.loss) == ("adamw", "full", "full-logits")
    assert (levers.attention, levers.parallel, levers.offload) == ("sdpa", "ddp", "none")
    assert levers.micro_batch == 1
    assert "auto" not in {str(value) for value in vars(levers).values()}
    assert effective("1xRTX3090")[0].levers.parallel == "none"
    assert recipe.parts == dict.fromkeys(("vision", "connector", "language", "head"), "full")
    assert isinstance(recipe.hardware, HardwareKeys)
    assert recipe.hardware.gpus == "2xRTX3090"
    # Every lever but packing, which is no auto, the batch and the workload.
    assert len(defaults) == len(vars(levers)) - 1 + 2
    assert {"batch", "workload", "levers.precision"} <= set(defaults)


def test_what_is_pinned_is_no_default_and_stays() -> None:
    keys = {"levers": Levers(precision="fp32", micro_batch=2, optimizer="sgd"), "batch": 8}
    recipe, defaults = effective("2xRTX3090", **keys)
    assert (recipe.levers.precision, recipe.levers.micro_batch, recipe.batch) == ("fp32", 2, 8)
    assert not {"levers.precision", "levers.micro_batch", "levers.optimizer", "batch"} & set(defaults)
    again, nothing = resolve(recipe, parse_hardware("2xRTX3090"), FAMILY, profile())
    assert again == recipe
    assert nothing == ("workload",)


def test_data_is_no_default_workload() -> None:
    cost = SampleCost(tokens=10, trained_tokens=5, image_tokens=0, crops=0, patches=0)
    workload = Workload(worst=cost, mean=None, samples=3, source="data")
    _, defaults = resolve(Recipe(model="m"), parse_hardware("1xT4"), FAMILY, profile(), workload)
    assert "workload" not in defaults


def test_detected_hardware_counts_as_a_default() -> None:
    found = Hardware(gpu=None, gpus_per_node=1, detected=True)
    assert "hardware" in resolve(Recipe(model="m"), found, FAMILY, profile())[1]


@pytest.mark.parametrize(
    ("gpus", "micro", "batch"),
    [
        ("1xT4", "auto", 32),
        ("3xT4", "auto", 33),
        ("5xT4", "auto", 30),
        ("2x8xT4", 4, 64),
        ("7xT4", 3, 42),
        ("1xT4", 3, 33),
    ],
)
def test_batch_is_the_multiple_nearest_to_32(gpus: str, micro: Any, batch: int) -> None:
    recipe, _ = effective(gpus, levers=Levers(micro_batch=micro))
    assert recipe.batch == batch
    per_step = parse_hardware(gpus).ranks * int(recipe.levers.micro_batch)
    assert micro_batches(recipe, parse_hardware(gpus)) * per_step == batch


@pytest.mark.parametrize(
    ("batch", "micro", "near"), [(31, 2, "28 or 32"), (5, 2, "4 or 8"), (3, 2, "4 or 8"), (1, 4, "8 or 16")]
)
def test_batch_that_does_not_divide_names_the_two_nearest(batch: int, micro: int, near: str) -> None:
    error = refused("2xT4", batch=batch, levers=Levers(micro_batch=micro))
    assert f"batch {batch} is not a multiple of 2 GPUs x micro_batch {micro}" in error.problem
    assert error.hint == f"batch: {near}"


@pytest.mark.parametrize(
    ("gpus", "levers", "problem", "hint"),
    [
        ("2xA100-40G", {"precision": "bf16-mixed"}, "does not run with parallel: ddp", "precision: bf16-amp"),
        ("2xA100-40G", {"precision": "bf16-amp", "parallel": "zero2"}, "parallel: zero2", "precision: bf16-mixed"),
        ("2xT4", {"precision": "fp16-amp", "parallel": "zero2"}, "parallel: zero2", "precision: fp16-mixed"),
        ("2xA100-40G", {"precision": "fp16-mixed", "parallel": "fsdp"}, "parallel: fsdp", "precision: bf16-mixed"),
        ("1xT4", {"precision": "pure-bf16"}, "needs bf16, which T4 does not have", "precision: fp16-amp"),
        ("2xV100-32G", {"precision": "bf16-mixed", "parallel": "zero3"}, "needs bf16", "precision: fp16-mixed"),
        ("1xA100-40G", {"precision": "bf16-amp", "autocast": False}, "computes under autocast", "autocast: auto"),
        ("1xA100-40G", {"precision": "fp32", "autocast": True}, "computes in fp32", "autocast: auto"),
        ("2xA100-40G", {"optimizer": "adafactor", "parallel": "zero2"}, "adafactor does not run", "use adamw"),
        ("1xcpu", {"optimizer": "adamw-8bit"}, "needs a GPU, and 1xcpu has none", "optimizer: adamw"),
        ("1xcpu", {"attention": "flash"}, "needs a GPU", "attention: sdpa"),
        ("1xT4", {"attention": "flash"}, "T4 has 7.5", "attention: sdpa"),
        ("1xcpu", {"loss": "fused"}, "needs a GPU", "loss: chunked"),
        ("1xT4", {"optimizer": "adamv"}, "optimizer 'adamv'", "did you mean adamw?"),
        ("1xT4", {"precision": "bf16"}, "precision 'bf16'", "did you mean"),
        ("2xT4", {"parallel": "none"}, "uses one of the 2 GPUs of 2xT4", "ddp"),
        ("2xT4", {"parallel": "layers"}, "not forecast in this version", "none, ddp"),
        ("1xT4", {"offload": "optimizer"}, "does not run with parallel: none", "zero1, zero2 or zero3"),
        (
            "1xT4",
            {"activation_offload": True, "checkpointing": "none"},
            "moves what checkpointed",
            "checkpointing: full",
        ),
    ],
)
def test_levers_that_do_not_go_together(gpus: str, levers: Any, problem: str, hint: str) -> None:
    error = refused(gpus, levers=Levers(**levers))
    assert problem in error.problem
    assert hint in error.hint
    assert "\n" not in error.problem


def test_adapters_that_the_hardware_or_the_scaler_refuses() -> None:
    assert "which T4 does not have" in refused("1xT4", method="lora", lora=Lora(dtype="bf16")).problem
    assert "gradient scaler refuses" in refused("1xT4", method="lora", lora=Lora(dtype="fp16")).problem
    zero = effective("2xT4", method="lora", lora=Lora(dtype="bf16"), levers=Levers(parallel="zero2"))
    assert zero[0].levers.precision == "fp16-mixed"  # ZeRO casts adapters, so their own dtype is not used


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"parts": {"audio": "full"}}, "a hand model has vision, connector, language and head, no audio part"),
        ({"parts": {"vision": "last-3"}}, "the vision part has 2 blocks"),
        ({"parts": {"vision": "last-0"}}, "the vision part has 2 blocks"),
        ({"parts": {"connector": "last-1"}}, "the connector part has no numbered blocks"),
        ({"parts": dict.fromkeys(("vision", "connector", "language", "head"), "frozen")}, "nothing would learn"),
        ({"method": "qlora", "parts": {"language": "full"}}, "in 4 bit, which cannot learn in place"),
        ({"method": "lora", "parts": {"language": "frozen"}}, "no part is lora"),
        ({"lora": Lora(targets=("q_proj",))}, "lora.targets is set, but no part is lora"),
        ({"lora": Lora(modules_to_save=("proj",))}, "no part is lora"),
        ({"method": "lora", "parts": {"vision": "lora"}}, "parts.vision: lora, but lora.targets: auto names no module"),
        ({"method": "lora", "parts": {"head": "lora"}, "lora": Lora(targets="all-linear")}, "parts.head: lora"),
        ({"method": "lora", "lora": Lora(targets=("q_prj",))}, "no module in the language part ends in 'q_prj'"),
        ({"method": "lora", "lora": Lora(targets=("norm",))}, "no module in the language part ends in 'norm'"),
        ({"method": "lora", "lora": Lora(targets=("fc",))}, "no module in the language part ends in 'fc'"),
        ({"method": "lora", "lora": Lora(modules_to_save=("roj",))}, "no module in this model ends in 'roj'"),
        (
            {"method": "lora", "parts": {"connector": "full"}, "lora": Lora(modules_to_save=("proj",))},
            "bridge.proj is in a part that learns already",
        ),
    ],
)
def test_parts_that_do_not_fit_the_model(keys: Any, problem: str) -> None:
    assert problem in refused("1xA100-80G", **keys).problem


def test_a_head_tied_to_the_embeddings_follows_them() -> None:
    tied = profile(tied=True)
    hardware = parse_hardware("1xA100-80G")

    def modes(**keys: Any) -> Any:
        return resolve(Recipe(model="m", **keys), hardware, FAMILY, tied)[0].parts

    assert modes()["head"] == "full"
    assert modes(parts={"language": "frozen"})["head"] == "frozen"
    assert modes(parts={"language": "last-1"})["head"] == "frozen"
    assert modes(method="lora")["head"] == "frozen"
    with pytest.raises(UserError, match=r"lm_head.weight is tied to lm.embed_tokens.weight of the language part"):
        modes(parts={"language": "frozen", "head": "full"})


def test_all_problems_at_once() -> None:
    error = refused(
        "2xT4",
        batch=31,
        parts={"audio": "full", "vision": "last-9"},
        levers=Levers(precision="pure-bf16", micro_batch=2, offload="optimizer"),
    )
    assert error.problem.startswith("5 settings do not go together")
    for words in ("batch 31", "parts.audio", "last-9", "needs bf16", "levers.offload"):
        assert words in error.problem
    assert error.exit_code == 1


def test_selective_checkpointing_of_layers_with_a_bias_is_refused_under_zero3() -> None:
    """The hand model's eye has biases in its blocks, its language model has none."""
    error = refused("2xA100-40G", levers=Levers(parallel="zero3", checkpointing="selective"))
    assert "adds the bias of 2 layers twice (eye.blocks.0.fc.bias ...)" in error.problem
    assert error.hint == "levers.checkpointing: full"
    only: Any = {"vision": "full", "connector": "none", "language": "selective"}
    effective("2xA100-40G", levers=Levers(parallel="zero3", checkpointing=only))
    effective("2xA100-40G", levers=Levers(parallel="zero2", checkpointing="selective"))
