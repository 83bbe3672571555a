"""Seconds of a step: every part by hand, arrays of candidates, overlap, and the fit to published runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from memfit.catalog.gpus import GPUS, parse_hardware
from memfit.physics.decoder import DecoderRun, DecoderShape, decoder_work
from memfit.physics.rates import rates_of
from memfit.physics.speed import (
    CALL_SECONDS,
    HOST_ADAM_BYTES,
    HOST_STEP_RATE,
    LAUNCH_SECONDS,
    PARTS,
    PRODUCT_SHARE,
    TYPICAL_ERROR,
    Rates,
    StepWork,
    adam_bytes,
    gather_seconds,
    load_seconds,
    reduce_seconds,
    step_time,
)

ROOT = Path(__file__).resolve().parents[2]
# Round rates, so that seconds can be read off: 100 FLOP/s, 50 B/s of memory, 10 B/s on the ring, 5 B/s over PCIe.
RATES = Rates(100.0, 50.0, 10.0, 5.0, 20.0, product_share=1.0, memory_share=1.0, launch_seconds=0.01, call_seconds=0.1)


def seconds(**work: float) -> dict[str, Any]:
    """The parts that are not 0."""
    found = step_time(StepWork(**{"flops": 0.0, **work}), RATES)
    assert set(found.parts) == set(PARTS)
    assert float(found.seconds) == pytest.approx(sum(float(part) for part in found.parts.values()))
    assert float(found.low) <= float(found.seconds) + 1e-12
    assert float(found.seconds) <= float(found.high) + 1e-12
    return {name: pytest.approx(float(part)) for name, part in found.parts.items() if part}


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        ({"flops": 300.0}, {"products": 3.0}),
        ({"flops": 300.0, "micro_batches": 4, "recompute_flops": 100.0}, {"products": 12.0, "recompute": 4.0}),
        ({"elementwise_bytes": 100.0, "micro_batches": 2}, {"elementwise": 4.0}),
        ({"optimizer_bytes": 100.0, "micro_batches": 8}, {"optimizer": 2.0}),
        # 500 kernels of 0.01 s and 5 calls of 0.1 s are 5.5 s, of which 3 s pass while the GPU computes.
        ({"flops": 300.0, "kernels": 500.0, "engine_calls": 5.0}, {"products": 3.0, "launch": 2.5}),
        ({"flops": 300.0, "kernels": 200.0}, {"products": 3.0}),
        # Four ranks pass on three quarters: 40 B are 3 s, an all-reduce twice that.
        ({"step_gathered_bytes": 40.0, "ranks": 4}, {"links": 3.0}),
        ({"step_scattered_bytes": 40.0, "ranks": 4}, {"links": 3.0}),
        ({"step_reduced_bytes": 40.0, "ranks": 4}, {"links": 6.0}),
        ({"gathered_bytes": 40.0, "scattered_bytes": 40.0, "ranks": 4, "micro_batches": 2}, {"links": 12.0}),
        ({"step_reduced_bytes": 40.0, "ranks": 1}, {}),
        ({"step_down_bytes": 10.0, "step_up_bytes": 5.0}, {"offload": 3.0}),
        ({"down_bytes": 10.0, "up_bytes": 10.0, "micro_batches": 3}, {"offload": 12.0}),
        ({"host_optimizer_bytes": 60.0}, {"host optimizer": 3.0}),
        # Two workers make 8 s of loading 4 s, of which the GPU's 3 s are covered.
        ({"flops": 300.0, "load_seconds": 8.0, "workers": 2}, {"products": 3.0, "loading": 1.0}),
        ({"flops": 300.0, "load_seconds": 5.0, "workers": 2}, {"products": 3.0}),
        # Half of 6 s of links hides behind 2 s of computing: no more than 2 s can.
        (
            {"flops": 200.0, "step_reduced_bytes": 40.0, "ranks": 4, "hidden_links": 0.5},
            {"products": 2.0, "links": 4.0},
        ),
        ({"flops": 900.0, "step_down_bytes": 10.0, "hidden_offload": 1.0}, {"products": 9.0}),
    ],
)
def test_parts_by_hand(work: dict[str, float], expected: dict[str, float]) -> None:
    assert seconds(**work) == expected


def test_the_two_ends_of_overlap() -> None:
    """3 s of products, 6 s of links, 2 s of PCIe: 3 + 3 + 0 at best (each hides behind the products), 11 at worst."""
    work = StepWork(flops=300.0, step_reduced_bytes=40.0, ranks=4, step_down_bytes=10.0, hidden_links=0.5)
    found = step_time(work, RATES)
    assert (float(found.low), float(found.seconds), float(found.high)) == (6.0, 8.0, 11.0)
    loaded = step_time(dataclasses.replace(work, load_seconds=20.0), RATES)
    assert (float(loaded.low), float(loaded.high)) == (20.0, 31.0)


def test_what_binds() -> None:
    assert step_time(StepWork(flops=300.0, optimizer_bytes=100.0), RATES).bound == "products"
    assert step_time(StepWork(flops=1.0, host_optimizer_bytes=100.0), RATES).bound == "host optimizer"
    many = StepWork(flops=np.array([300.0, 1.0]), step_reduced_bytes=40.0, ranks=2)
    assert step_time(many, RATES).bound.tolist() == ["links", "links"]
    many = StepWork(flops=np.array([900.0, 1.0]), step_reduced_bytes=40.0, ranks=2)
    assert step_time(many, RATES).bound.tolist() == ["products", "links"]


def test_arrays_give_what_numbers_give() -> None:
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {
        name: rng.integers(0, 1000, 50).astype(float)
        for name in ("flops", "recompute_flops", "elementwise_bytes", "kernels", "gathered_bytes", "step_up_bytes")
    }
    columns |= {
        "micro_batches": rng.integers(1, 9, 50),
        "ranks": rng.integers(1, 9, 50),
        "hidden_links": rng.random(50),
    }
    together = step_time(StepWork(**columns), RATES)
    for index in range(50):
        alone = step_time(StepWork(**{name: values[index] for name, values in columns.items()}), RATES)
        assert float(np.asarray(together.seconds)[index]) == pytest.approx(float(alone.seconds))
        assert together.bound[index] == alone.bound


def test_a_hundred_thousand_candidates() -> None:
    flops = np.linspace(1, 1e15, 100_000)
    start = time.process_time()
    found = step_time(StepWork(flops=flops, micro_batches=np.arange(1, 100_001) % 8 + 1, ranks=8), RATES)
    assert len(np.asarray(found.seconds)) == 100_000
    assert time.process_time() - start < 0.5


def test_rings() -> None:
    assert gather_seconds(80.0, 8, 10.0) == 7.0
    assert reduce_seconds(80.0, 8, 10.0) == 14.0
    assert gather_seconds(80.0, 1, 10.0) == 0.0


def test_loading_by_hand() -> None:
    """A picture of 1 megapixel: 40 ms to decode and 20 ms to resize."""
    assert load_seconds(1e6) == pytest.approx(0.06)


def test_bytes_of_adam() -> None:
    """fp32: 16 read and 12 written; pure bf16 half of it; on the host a 16-bit copy more."""
    assert (adam_bytes(4, 4, 4), adam_bytes(2, 2, 2), HOST_ADAM_BYTES) == (28, 14, 30)


def test_work_of_a_decoder_by_hand() -> None:
    """h 2, f 4, V 10, one layer, 3 tokens: 16 + 24 weights a layer, 20 in the head, attention 4 x 3 x 3 x 2 / 2."""
    shape = DecoderShape(hidden=2, layers=1, feed_forward=4, vocabulary=10, kv=2)
    assert (shape.layer_parameters, shape.head_parameters, shape.parameters) == (40, 20, 80)
    work = decoder_work(shape, DecoderRun(tokens=3, learning=60, checkpointing=False))
    forward = 2 * 3 * 60 + 36
    assert work.flops == forward + (2 * 3 * 60 + 72) + 2 * 3 * 60
    assert work.recompute_flops == 0
    again = decoder_work(shape, DecoderRun(tokens=3, learning=60))
    assert again.recompute_flops == 2 * 3 * 40 + 36
    assert again.flops == work.flops
    whole = decoder_work(shape, DecoderRun(tokens=3, attention="full", checkpointing=False))
    assert whole.flops == 2 * (2 * 3 * 60) + 3 * 72
    layer = 84 * 2 + 16 * 4 + 10 * 4
    assert work.elementwise_bytes == 3 * (3 * layer + 38 * 10)
    assert again.kernels == 4 * 40
    assert decoder_work(shape, DecoderRun(tokens=3, by_module=True)).engine_calls == 8 * 3


def test_rates_of_hardware() -> None:
    """2 x 3090 over host memory: 76.58 TFLOP/s measured, 936 GB/s, PCIe 4 x16 at 12/15.75 of 31.5 GB/s."""
    rates = rates_of(parse_hardware("2xRTX3090"), "bf16")
    assert rates is not None
    assert rates.products == pytest.approx(76.58e12)
    assert rates.memory == 936e9
    assert rates.host_link == pytest.approx(24e9)
    assert rates.ring == pytest.approx(17.5e9, rel=0.01)
    assert rates.host_step == HOST_STEP_RATE["desktop"]
    server = rates_of(parse_hardware("8xA100-80G"), "bf16")
    assert server is not None
    assert server.host_step == HOST_STEP_RATE["server"]
    assert rates_of(parse_hardware("2xcpu"), "fp32") is None
    assert rates_of(parse_hardware("1xT4"), "bf16") is None
    for row in GPUS:
        assert rates_of(parse_hardware(f"4x{row.name}"), "fp16") is not None


def speed_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speed_docs", ROOT / "tools/speed_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["speed_docs"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    return speed_docs()


def test_models_of_published_rows_have_their_parameters(docs: ModuleType) -> None:
    for line in docs.ROWS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert "quote" not in row
        if any(reason in row["id"] for reason in ("litgpt", "peft", "swift-bench", "qwenvl")):
            continue
        shape = docs.SHAPES[
            next(key for key in sorted(docs.SHAPES, key=len, reverse=True) if row["id"].startswith(key))
        ]
        assert shape.parameters / 1e9 == pytest.approx(row["params_b"], rel=0.01), row["id"]


def test_constants_are_what_the_fit_gives(docs: ModuleType) -> None:
    rows, _ = docs.read_rows()
    fitted = docs.fit(rows)
    assert fitted == pytest.approx(
        {"product_share": PRODUCT_SHARE, "launch_seconds": LAUNCH_SECONDS, "call_seconds": CALL_SECONDS}
    )
    planted = [dataclasses.replace(row, seconds=1.2 * row.seconds) for row in rows]
    assert docs.fit(planted) != fitted


def test_the_page_and_its_errors(docs: ModuleType) -> None:
    rows, out = docs.read_rows()
    assert len(rows) + len(out) == len(docs.ROWS.read_text(encoding="utf-8").splitlines())
    judged = docs.left_source_out(rows)
    errors = sorted(abs(one.error) for one in judged)
    assert errors[len(errors) // 2] == pytest.approx(TYPICAL_ERROR, abs=0.005)
    assert errors[-1] < 0.75
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page()
    host = docs.host_row()
    assert float(host.predicted.seconds) < host.seconds
