"""Speeds and links of the GPU rows: what must hold whoever typed them, and rates worked out by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest

from memfit.catalog.gpus import GPUS, find_gpu, parse_hardware
from memfit.catalog.links import NETWORK_RATE, nvlink_rate, pcie_rate, ring_rate
from memfit.catalog.matmul import MATMUL, achieved_flops
from memfit.cli import main
from memfit.specs.hardware import GpuRow

# Dense FLOPs of one multiprocessor in one clock for 16-bit products summed in fp32, by compute capability; then for
# the cards of that generation that run them at half rate. Source: the generations' architecture papers.
PER_CLOCK = {"6.0": 128, "6.1": 256, "7.0": 1024, "7.5": 1024, "8.0": 2048, "8.6": 1024, "8.9": 1024}
PER_CLOCK |= {"9.0": 4096, "10.0": 8192, "12.0": 512}
HALF_RATE = {row.name for row in GPUS if row.name.startswith("RTX") and row.name != "RTX6000Ada"} | {"A10G", "L40"}
# The least and most of a generation's memory, in GB/s, by what it is made of.
GDDR, HBM = (288, 1792), (732, 8000)
WITH_HBM = {"6.0", "7.0", "8.0", "9.0", "10.0"}


def products_per_clock(row: GpuRow) -> float:
    assert row.speed is not None
    return row.speed.fp16 / (row.speed.sms * row.speed.boost_hz)


def expected_per_clock(row: GpuRow) -> int:
    full = PER_CLOCK[row.compute_capability]
    return full // 2 if row.name in HALF_RATE and row.compute_capability != "12.0" else full


@pytest.mark.parametrize("row", GPUS, ids=lambda row: row.name)
def test_flops_are_multiprocessors_times_clock(row: GpuRow) -> None:
    assert products_per_clock(row) == pytest.approx(expected_per_clock(row), rel=0.02)


def test_a_figure_with_sparsity_or_of_another_clock_would_be_found() -> None:
    row = find_gpu("RTX4090")
    assert row.speed is not None
    for wrong in (2.0, 1.1):
        planted = dataclasses.replace(row, speed=dataclasses.replace(row.speed, fp16=wrong * row.speed.fp16))
        assert products_per_clock(planted) != pytest.approx(expected_per_clock(planted), rel=0.02)


@pytest.mark.parametrize("row", GPUS, ids=lambda row: row.name)
def test_speed_row(row: GpuRow) -> None:
    speed = row.speed
    assert speed is not None
    low, high = HBM if row.compute_capability in WITH_HBM else GDDR
    assert low <= speed.bandwidth / 1e9 <= high
    assert (speed.bf16 is not None) == row.has_bf16
    assert (speed.tf32 is not None) == row.has_bf16  # both came with Ampere
    if speed.tf32 is not None:
        assert speed.bf16 == speed.fp16
        assert speed.fp16 / speed.tf32 == pytest.approx(2, rel=0.02)
    assert speed.fp32 <= speed.fp16
    # 64 or 128 lanes of two FLOPs a clock; Hopper and Blackwell clock them higher than their tensor cores.
    assert any(
        lanes * 2 * speed.sms * speed.boost_hz * clock == pytest.approx(speed.fp32, rel=0.05)
        for lanes in (64, 128)
        for clock in (1.0, 1.083, 1.155)
    )
    assert speed.verified in {"cited", "memory"}
    assert len(speed.source) > 8


@pytest.mark.parametrize("row", GPUS, ids=lambda row: row.name)
def test_link_row(row: GpuRow) -> None:
    link = row.link
    assert link is not None
    generations = {"6": 3, "7": 3, "8": 4, "9": 5, "10": 5, "12": 5}
    assert link.pcie_generation == generations[row.compute_capability.partition(".")[0]]
    assert link.pcie_lanes in {8, 16}
    assert bool(link.nvlink) == bool(link.nvlinks) == bool(link.nvlink_reach)
    assert link.nvlink_reach in {"", "pair", "all"}
    if link.nvlinks:
        assert link.nvlink / link.nvlinks / 1e9 in (14.0625, 25.0, 50.0)
        assert 0.6 < nvlink_rate(link, row.compute_capability) / link.nvlink <= 1
    assert link.source
    assert link.verified in {"cited", "memory"}


def test_how_many_rows_there_are() -> None:
    assert len(GPUS) >= 25
    assert {"RTX2080Ti", "RTX5090", "T4", "V100-16G", "A10", "L4", "L40S", "H200", "B200"} <= {row.name for row in GPUS}
    assert sum(row.verified == "cited" for row in GPUS) >= 25


def test_the_command_prints_rows_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpus", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [row.name for row in GPUS]
    assert rows[0]["speed"]["source"]
    assert rows[0]["link"]["pcie_generation"] == 3


def test_pcie_by_hand() -> None:
    """16 lanes of 8 GT/s x 128/130 / 8 bit = 15.75 GB/s, of which NCCL takes 12."""
    link = find_gpu("T4").link
    assert link is not None
    assert pcie_rate(link) == pytest.approx(12e9)
    narrow = find_gpu("RTX4060Ti-16G").link
    assert narrow is not None
    assert pcie_rate(narrow) == pytest.approx(12e9)  # generation 4, but 8 lanes


@pytest.mark.parametrize(
    ("text", "kind", "rate"),
    [
        ("1xA100-80G", "none", float("inf")),
        ("2xcpu", "none", float("inf")),
        ("8xA100-80G", "nvlink", 240e9),  # 12 x 20 GB/s
        ("8xH100-80G", "nvlink", 370.8e9),  # 18 x 20.6
        ("2x8xA100-40G", "network", NETWORK_RATE),
        ("2xL40S", "pcie", 24e9),
        ("2xRTX3090", "host", 31.508e9 * 35 / 63.015),
        ("8xRTX4090", "host", 31.508e9 * 28 / 63.015),
    ],
)
def test_what_a_ring_carries(text: str, kind: str, rate: float) -> None:
    found = ring_rate(parse_hardware(text))
    assert found is not None
    assert found.kind == kind
    assert found.rate == pytest.approx(rate, rel=1e-3)
    assert found.source


def test_a_bridge_counts_where_it_was_detected() -> None:
    pair = parse_hardware("2xRTX3090")
    found = ring_rate(dataclasses.replace(pair, links="nvlink"))
    assert found is not None
    assert (found.kind, found.rate) == ("nvlink", 48e9)  # 4 x 12 GB/s
    assert pair.gpu is not None
    assert ring_rate(dataclasses.replace(pair, gpu=dataclasses.replace(pair.gpu, link=None))) is None


def test_measured_products() -> None:
    names = {row.name for row in GPUS}
    assert {row.gpu for row in MATMUL} <= names
    assert len({row.gpu for row in MATMUL}) == len(MATMUL)
    found = achieved_flops(find_gpu("A100-80G"), "bf16")
    assert found is not None
    assert (round(found.flops / 1e12, 2), found.verified) == (264.53, "measured")
    for row in GPUS:
        for precision in ("fp32", "tf32", "fp16", "bf16"):
            peak = row.speed.flops(precision) if row.speed else None
            got = achieved_flops(row, precision)
            assert (got is None) == (peak is None)
            if got is not None and peak is not None:
                assert 0.45 * peak < got.flops < 1.2 * peak, (row.name, precision)


def test_a_card_that_nobody_measured_takes_its_classes_median() -> None:
    """GeForce shares are 76.58/71.2, 42.65/44.1, 163.09/165.15, 239.1/209.5: their median is (0.9875 + 1.0756) / 2."""
    found = achieved_flops(find_gpu("RTX4080"), "bf16")
    assert found is not None
    assert found.verified == "similar"
    assert found.flops == pytest.approx(97.5e12 * (163.09 / 165.15 + 76.58 / 71.2) / 2)
