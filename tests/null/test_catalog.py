"""Every row, and what its numbers must be by hand."""

from __future__ import annotations

import pytest

from memfit.catalog.gpus import GPUS, find_gpu, parse_hardware
from memfit.catalog.methods import METHODS, NF4, NF4_DOUBLE, default_mode
from memfit.catalog.optimizers import OPTIMIZERS, STATE_RULES, find_optimizer, is_paged, state_bytes, state_formula
from memfit.catalog.precisions import ALONE, FSDP, PRECISIONS, ZERO, nearest_precision, precision_under
from memfit.catalog.torch_builds import TORCH_BUILDS
from memfit.errors import UserError
from memfit.physics.memory import scale_bytes
from memfit.specs.hardware import GpuRow
from memfit.strategies import STRATEGIES
from memfit.units import DTYPE_BYTES, GIB

PROMISED = (
    *("RTX3090", "RTX4090", "RTX4080", "A10", "T4", "V100-32G", "L40S"),
    *("A100-40G", "A100-80G", "H100-80G", "H100-96G"),
)


@pytest.mark.parametrize("row", GPUS, ids=lambda row: row.name)
def test_gpu_row(row: GpuRow) -> None:
    assert 0.9 * row.nominal_gib < row.capacity_bytes / GIB < row.nominal_gib
    assert row.source
    assert " " not in row.name
    assert row.has_bf16 == (float(row.compute_capability) >= 8.0)
    assert row.verified in {"cited", "measured", "nominal"}
    if row.verified == "nominal":
        assert row.capacity_bytes == int(0.965 * row.nominal_gib * GIB)
    assert find_gpu(row.name) is row
    assert find_gpu(row.name.lower()) is row


def test_promised_gpus_and_their_sources() -> None:
    names = {row.name: row for row in GPUS}
    assert set(PROMISED) <= set(names)
    assert all(names[name].verified == "cited" for name in PROMISED)
    assert round(names["RTX3090"].capacity_bytes / GIB, 2) == 23.69
    assert find_gpu("H100") is names["H100-80G"]
    assert len({row.name for row in GPUS}) == len(GPUS)


@pytest.mark.parametrize(
    ("text", "name", "per_node", "nodes"),
    [
        ("H100", "H100-80G", 1, 1),
        ("2xRTX3090", "RTX3090", 2, 1),
        ("2xrtx3090", "RTX3090", 2, 1),
        ("2x8xA100-40G", "A100-40G", 8, 2),
        ("8XA100-80GB", "A100-80G", 8, 1),
        ("NVIDIA GeForce RTX 4090", "RTX4090", 1, 1),
    ],
)
def test_hardware_is_read(text: str, name: str, per_node: int, nodes: int) -> None:
    hardware = parse_hardware(text, host_memory="128GiB", nvme="1TB")
    assert hardware.gpu is not None
    assert (hardware.gpu.name, hardware.gpus_per_node, hardware.nodes) == (name, per_node, nodes)
    assert hardware.ranks == per_node * nodes
    assert (hardware.host_memory_bytes, hardware.nvme_bytes) == (128 * GIB, 10**12)
    assert parse_hardware(hardware.text).gpu is hardware.gpu


def test_cpu_ranks() -> None:
    hardware = parse_hardware("2xcpu")
    assert (hardware.gpu, hardware.ranks, hardware.text) == (None, 2, "2xcpu")
    assert parse_hardware("cpu").ranks == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2xRTX3091", "RTX3090"),
        ("1xA100", "A100-40G or A100-80G"),
        ("V100", "V100-32G"),
        ("0xT4", "count of 0"),
        ("8x", "2xRTX3090"),
        ("", "2xRTX3090"),
        ("MI300X", "unknown GPU"),
    ],
)
def test_wrong_hardware_is_told(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse_hardware(text)
    assert words in str(error.value)


def test_wrong_sizes_are_told() -> None:
    with pytest.raises(UserError, match="host_memory: cannot read"):
        parse_hardware("1xT4", host_memory="much")


@pytest.mark.parametrize(
    ("name", "shape", "width", "kind", "expected"),
    [
        ("adamw", (10, 20), 4, "linear", 2 * 4 * 200),
        ("adamw", (10, 20), 2, "linear", 2 * 2 * 200),
        ("adamw-foreach", (7,), 4, "norm", 2 * 4 * 7),
        # 5120 elements are 20 blocks of 256: 2 x (5120 x 1 B + 20 x 4 B)
        ("adamw-8bit", (80, 64), 2, "linear", 2 * (5120 + 80)),
        # one element more begins a new block
        ("adamw-8bit", (5121,), 2, "linear", 2 * (5121 + 84)),
        ("adamw-8bit", (4095,), 2, "linear", 2 * 4 * 4095),
        ("adamw-8bit", (80, 64), 2, "embedding", 2 * 4 * 5120),
        ("adafactor", (10, 20), 4, "linear", 4 * (10 + 20)),
        ("adafactor", (7,), 2, "norm", 4 * 7),
        ("adafactor", (2, 3, 4), 4, "conv", 4 * (2 * 3 + 2 * 4)),
        ("lion", (10, 20), 2, "linear", 4 * 200),
        ("sgd", (10, 20), 4, "linear", 0),
    ],
)
def test_optimizer_states_by_hand(name: str, shape: tuple[int, ...], width: int, kind: str, expected: int) -> None:
    assert state_bytes(OPTIMIZERS[name], shape, width, kind) == expected


def test_8bit_adam_is_2_031_bytes_a_parameter() -> None:
    assert state_bytes(OPTIMIZERS["adamw-8bit"], (4096, 4096), 2, "linear") / 4096**2 == 2 * (1 + 4 / 256)


@pytest.mark.parametrize("row", OPTIMIZERS.values(), ids=lambda row: row.name)
def test_optimizer_row(row: object) -> None:
    optimizer = OPTIMIZERS[row.name]  # type: ignore[attr-defined]
    assert optimizer.states in STATE_RULES
    assert "x 4 B" in (text := state_formula(optimizer, [(64, 256), (8,)], ["linear", "norm"], 4)) or "4 B each" in text
    assert optimizer.runs_on <= set(STRATEGIES)
    assert optimizer.step_temporary in {"none", "state-copy", "unknown"}
    assert optimizer.source
    assert find_optimizer(optimizer.name) is optimizer


def test_what_can_be_trained_today() -> None:
    today = {row.name for row in OPTIMIZERS.values() if row.runs_today}
    assert today == {"adamw", "adamw-foreach", "adamw-8bit", "paged-adamw-8bit", "adafactor", "sgd"}
    assert {row.name for row in OPTIMIZERS.values() if row.package} == {"adamw-8bit", "paged-adamw-8bit"}
    assert {row.name for row in METHODS.values() if row.runs_today} == {"full", "lora", "qlora"}


def test_only_large_states_are_paged() -> None:
    paged = OPTIMIZERS["paged-adamw-8bit"]
    assert is_paged(paged, (100_000,))
    assert not is_paged(paged, (99_999,))
    assert not is_paged(OPTIMIZERS["adamw-8bit"], (100_000,))


def test_unknown_optimizer_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean adamw-8bit"):
        find_optimizer("adamw_8bit")


# (learning, master, moments, frozen) in bytes: design, "Precision speaks of the parameters that learn".
WIDTHS = {
    "fp32": (4, 0, 4, 4),
    "fp16-amp": (4, 0, 4, 2),
    "bf16-amp": (4, 0, 4, 2),
    "fp16-mixed": (2, 4, 4, 2),
    "bf16-mixed": (2, 4, 4, 2),
    "pure-bf16": (2, 0, 2, 2),
}
RUNS = {
    "none": {"fp32", "fp16-amp", "bf16-amp", "pure-bf16"},
    "ddp": {"fp32", "fp16-amp", "bf16-amp", "pure-bf16"},
    "zero1": {"fp32", "fp16-mixed", "bf16-mixed", "pure-bf16"},
    "zero2": {"fp32", "fp16-mixed", "bf16-mixed", "pure-bf16"},
    "zero3": {"fp32", "fp16-mixed", "bf16-mixed", "pure-bf16"},
    "fsdp": {"fp32", "bf16-amp", "bf16-mixed", "pure-bf16"},
}


def test_precision_widths() -> None:
    found = {
        row.name: tuple(
            int(DTYPE_BYTES[name]) if name else 0 for name in (row.learning, row.master, row.stepped, row.frozen)
        )
        for row in PRECISIONS.values()
    }
    assert found == WIDTHS
    assert {row.name for row in PRECISIONS.values() if row.autocast} == {"fp16-amp", "bf16-amp"}


@pytest.mark.parametrize("parallel", RUNS)
def test_which_precision_runs_where(parallel: str) -> None:
    assert {row.name for row in PRECISIONS.values() if parallel in row.runs_on} == RUNS[parallel]
    for row in PRECISIONS.values():
        if parallel not in row.runs_on:
            for gpu in ("T4", "A100-80G", "cpu"):
                near = nearest_precision(row, parallel, parse_hardware(gpu))
                assert near in RUNS[parallel]
                assert gpu != "T4" or not str(near).startswith("bf16")


def test_fsdp_shards_are_fp32_and_zero_keeps_its_own_copy() -> None:
    mixed = precision_under("bf16-mixed", "fsdp")
    assert (mixed.learning, mixed.master, mixed.frozen) == ("float32", None, "bfloat16")
    assert precision_under("pure-bf16", "zero2").master == "bfloat16"
    assert precision_under("fp32", "zero3").master == "float32"
    assert precision_under("bf16-amp", "ddp") is PRECISIONS["bf16-amp"]
    assert set(STRATEGIES) == ALONE | ZERO | FSDP


def test_methods() -> None:
    assert [default_mode(METHODS["full"], part) for part in ("vision", "language", "head")] == ["full"] * 3
    assert [default_mode(METHODS["lora"], part) for part in ("vision", "language", "head")] == [
        "frozen",
        "lora",
        "frozen",
    ]
    assert METHODS["qlora"].quantised_part == "language"


def test_bytes_of_a_4_bit_weight() -> None:
    """0.5 + 4/64 = 0.5625, and with double quantisation 0.5 + 1/64 + 4/(64 x 256) = 0.51587 and 1 KiB a tensor."""
    count = 4096 * 4096
    plain = scale_bytes(count, NF4.block, NF4.scale_bytes, NF4.nested_block, NF4.nested_bytes)
    assert 0.5 + plain / count == 0.5625
    double = scale_bytes(
        count, NF4_DOUBLE.block, NF4_DOUBLE.scale_bytes, NF4_DOUBLE.nested_block, NF4_DOUBLE.nested_bytes
    )
    assert 0.5 + (double - 1024) / count == 0.5 + 1 / 64 + 4 / (64 * 256)


def test_torch_builds_leave_no_gpu_row_without_one() -> None:
    for row in GPUS:
        assert any(build.has_kernels(float(row.compute_capability)) for build in TORCH_BUILDS if build.is_for("2.13.0"))
    assert [build.tag for build in TORCH_BUILDS if build.is_for("2.11.0")] == ["cu126", "cu128", "cu130"]
    assert [build.tag for build in TORCH_BUILDS if build.is_for("2.13.0")] == ["cu126", "cu130"]
    assert not any(build.is_for(text) for build in TORCH_BUILDS for text in ("3.0", "nonsense"))
