"""Training on GPUs, by the command that a user gives: one GPU learns what the CPU learns, two what one learns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from memfit.testing import make_dummy, make_samples
from tests.invariant.test_trajectories import COMMON, LAYOUTS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

# A GPU adds up in another order than a CPU, and chooses its kernels by shape; two GPUs differ in the order alone.
NEAR_CPU, NEAR_GPU = 2e-3, 1e-4
SETS = (*COMMON, "schedule.steps=6", "levers.pin_memory=true")


@dataclass(frozen=True)
class Ran:
    """What a run wrote."""

    folder: Path
    start: dict[str, Any]
    losses: tuple[float, ...]
    steps: tuple[dict[str, Any], ...]


def run(folder: Path, model: Path, data: Path, sets: tuple[str, ...], visible: str | None = None) -> Ran:
    """`memfit train` in a process of its own. `visible`: CUDA_VISIBLE_DEVICES."""
    environment = dict(os.environ) | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    # fp32 products without TF32, so that losses can be compared.
    environment["NVIDIA_TF32_OVERRIDE"] = "0"
    words = [f"data.train={data}", *SETS, *sets, f"run.folder={folder}"]
    options = [word for text in words for word in ("--set", text)]
    done = subprocess.run(
        [sys.executable, "-m", "memfit", "train", "--model", str(model), *options],
        capture_output=True, text=True, env=environment, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    steps = tuple(row for row in rows if row["event"] == "step")
    (start,) = (row for row in rows if row["event"] == "start")
    return Ran(folder, start, tuple(row["loss"] for row in steps), steps)


def follows(one: Ran, other: Ran, near: float) -> None:
    assert len(one.losses) == len(other.losses) == 6
    for a, b in zip(one.losses, other.losses, strict=True):
        assert abs(a - b) <= near * abs(a), (one.losses, other.losses)
    assert one.losses[-1] < one.losses[0]


@pytest.fixture(scope="module", params=["minicpmv4_6-full", "qwen2_5_vl-lora"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str, Ran]:
    """A tiny model, its data, the method, and the run on one GPU."""
    root = tmp_path_factory.mktemp(request.param)
    kind, _, method = request.param.partition("-")
    model, data = make_dummy(kind, root / "model"), make_samples(root / "samples", 13)
    return model, data, method, run(root / "one", model, data, (f"method={method}", "hardware=auto"), "0")


def test_one_gpu_learns_what_the_cpu_learns(setting: Any, tmp_path: Path) -> None:
    model, data, method, alone = setting
    follows(run(tmp_path / "cpu", model, data, (f"method={method}", "hardware.gpus=1xcpu")), alone, NEAR_CPU)
    assert all(row["peak_bytes"] > 0 and row["seconds"] > 0 for row in alone.steps)


@pytest.mark.parametrize("name", ["zero2, optimizer offloaded", "zero3, all offloaded"])
def test_an_engine_on_one_gpu_offloads_and_learns_the_same(setting: Any, tmp_path: Path, name: str) -> None:
    model, data, method, alone = setting
    pytest.importorskip("deepspeed")
    found = run(tmp_path / "run", model, data, (f"method={method}", "hardware=auto", *pinned(name)), "0")
    follows(alone, found, NEAR_GPU)
    assert any("no GPU has confirmed it" in note for note in found.start["notes"])


@two_gpus
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_gpus_learn_what_one_learns(setting: Any, tmp_path: Path, name: str) -> None:
    model, data, method, alone = setting
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    found = run(tmp_path / "run", model, data, (f"method={method}", "hardware=auto", *pinned(name)), "0,1")
    follows(alone, found, NEAR_GPU)
    assert found.start["ranks"] == 2


@pytest.mark.parametrize("parallel", ["none", pytest.param("ddp", marks=two_gpus)])
def test_four_bits_learn(setting: Any, tmp_path: Path, parallel: str) -> None:
    pytest.importorskip("bitsandbytes")
    model, data, _, _ = setting
    sets = ("method=qlora", "levers.precision=pure-bf16", "hardware=auto", "levers.optimizer=paged-adamw-8bit")
    found = run(tmp_path / "run", model, data, sets, "0" if parallel == "none" else "0,1")
    assert found.losses[-1] < found.losses[0]


def test_expandable_segments_are_in_effect(setting: Any, tmp_path: Path) -> None:
    model, data, method, alone = setting
    sets = (f"method={method}", "hardware=auto", "levers.allocator=expandable")
    follows(alone, run(tmp_path / "run", model, data, sets, "0"), NEAR_GPU)


def pinned(name: str) -> tuple[str, ...]:
    """The layout's settings; what is offloaded is page-locked, as a plan has it on GPUs."""
    return tuple(text for text in LAYOUTS[name] if not text.startswith("levers.pin_memory"))
