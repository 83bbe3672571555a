"""Reading back on two CPU ranks: no healthy engine fails a check, and errors in an engine's objects are seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memfit.engine.launch import start
from memfit.testing import make_dummy, make_samples
from tests.invariant.ready import deepspeed_is_ready
from tests.invariant.trajectories import Case, Common, _job

pytestmark = pytest.mark.long
SCRIPT = Path(__file__).parent / "readback_ranks.py"
SETS = (
    *("data.eval=0", "hardware.gpus=2xcpu", "levers.micro_batch=1", "batch=4", "schedule.steps=2"),
    *("schedule.learning_rate=1e-3", "schedule.warmup=0.5", "lora.rank=4"),
)
# Tiny parameters would all stay gathered.
SPLIT = 'engine={"zero": {"stage3_param_persistence_threshold": 0}}'
ENGINES = {
    "ddp": ("levers.parallel=ddp", "levers.precision=bf16-amp", "levers.checkpointing=full"),
    "ddp-lora": ("levers.parallel=ddp", "levers.precision=pure-bf16", "method=lora"),
    "fsdp": ("levers.parallel=fsdp", "levers.precision=bf16-mixed", "levers.checkpointing=full"),
    "fsdp-offload-lora": (
        "levers.parallel=fsdp",
        "levers.precision=fp32",
        "levers.offload=params+optimizer",
        "method=lora",
    ),
}
ZERO = {
    "zero1-offload": ("levers.parallel=zero1", "levers.precision=bf16-mixed", "levers.offload=optimizer"),
    "zero2": ("levers.parallel=zero2", "levers.precision=pure-bf16", "levers.checkpointing=selective"),
    "zero3": (
        SPLIT,
        "levers.parallel=zero3",
        "levers.precision=fp32",
        "levers.loss=chunked",
        "levers.checkpointing=full",
    ),
    "zero3-offload-lora": (
        *("levers.parallel=zero3", "levers.precision=bf16-mixed", "levers.offload=params+optimizer", "method=lora"),
    ),
}
# error -> the levers that turn red, and no other
WANTED = {
    "rate on rank 1": {"schedule.learning_rate"},
    "rate on all": {"schedule.learning_rate"},
    "small bucket": {"engine.zero.reduce_bucket_size"},
    "no clipping": {"schedule.clip"},
    "another stage": {"levers.parallel"},
    "gathered": {"zero.Init"},
    "persistent": {"engine.zero.stage3_param_persistence_threshold"},
    "fp16": {"FSDP2's dtypes"},
    "stays gathered": {"engine.fsdp.reshard_after_forward"},
    "bucket view": {"engine.ddp.gradient_as_bucket_view"},
}


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> Common:
    root = tmp_path_factory.mktemp("ranks")
    return Common(make_dummy("qwen2_5_vl", root / "model"), make_samples(root / "samples", 12), SETS)


def found_in_ranks(common: Common, cases: dict[str, tuple[str, ...]], root: Path) -> dict[str, Any]:
    for name, sets in cases.items():
        _job(common, Case(name, sets), root)
    file = root / "cases.json"
    file.write_text(json.dumps([{"folder": str(root / name)} for name in cases]))
    start([str(SCRIPT), str(file)], 2, root / "logs")
    return {name: json.loads((root / name / "checks.json").read_text()) for name in cases}


def check(found: dict[str, Any]) -> None:
    for engine, results in found.items():
        assert results.pop("") == {}, engine
        levers = set(results.pop("levers"))
        assert {
            "levers.parallel",
            "hardware (ranks)",
            "levers.offload",
            "optimizer states",
            "dead parameters",
        } <= levers
        for fault, failed in results.items():
            wanted = WANTED.get(fault, {"levers.offload"})
            assert wanted <= set(failed), f"{engine}: {fault}"
            assert len(failed) <= len(wanted) + 3, f"{engine}: {fault} turned {sorted(failed)} red"
        assert results["rate on rank 1"]["schedule.learning_rate"][1].startswith("rank 1 only"), engine
        assert results["rate on all"]["schedule.learning_rate"][1].startswith("every rank"), engine


def test_torch_engines_are_read_back(common: Common, tmp_path: Path) -> None:
    check(found_in_ranks(common, ENGINES, tmp_path))


@pytest.mark.parametrize(
    "names", [("zero1-offload", "zero2"), ("zero3",), ("zero3-offload-lora",)], ids=lambda names: names[0]
)
def test_deepspeed_is_read_back(common: Common, tmp_path: Path, names: tuple[str, ...]) -> None:
    if not deepspeed_is_ready():
        pytest.skip("DeepSpeed or its compiled operators are missing: make ops")
    check(found_in_ranks(common, {name: ZERO[name] for name in names}, tmp_path))
