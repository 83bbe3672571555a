"""What comes with memfit: a catalogued model is forecast whole in a process that cannot import torch."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import memfit.inputs.cache as cache
from memfit.inputs.cache import installed_versions
from memfit.inputs.shipped import _rows, _with_tables, packed, shipped
from tests.null.test_torch_blocked import BLOCK

DATA = Path(cache.__file__).parents[1] / "catalog" / "data"
ESTIMATE = """
from memfit.cli import main
code = main(["estimate", "--model", "{model}", "--set", "method=lora", "--gpus", "{gpus}", "--json"{more}])
assert not {{"torch", "transformers"}} & set(sys.modules), "torch came in"
sys.exit(code)
"""


def test_all_of_it_is_small_and_readable() -> None:
    files = list(DATA.rglob("*.json.gz"))
    assert files
    assert sum(path.stat().st_size for path in files) < 2 << 20
    for path in files:
        value = shipped(path.parent.name, path.name.removesuffix(".json.gz"))
        assert value is not None
        assert packed(value) == path.read_bytes()


def test_packing_loses_nothing() -> None:
    """Numbers as steps from row to row, words and nulls as they are, an empty table."""
    trace = {"stretches": [[1, "a", None], [5, "", 2], [3, "a", 4]], "timeline": [], "parts": [[1, 2]]}
    value = {"trace": trace, "reserved": None}
    text = json.loads(gzip.decompress(packed(value)))["trace"]
    assert text["stretches"] == [[1, 4, -2], ["a", "", "a"], [None, 2, 4]]
    assert text["parts"] == [[1, 2]]
    assert _with_tables(json.loads(gzip.decompress(packed(value))), _rows) == value


def test_what_is_not_there() -> None:
    assert shipped("profiles", "no such key") is None


@pytest.mark.parametrize(
    ("model", "gpus", "more"),
    [
        ("openbmb/MiniCPM-V-4_6", "1xRTX4090", ()),
        # Neither this length nor this card is shipped: the tape is played and the allocator replayed.
        ("llama-3.2-1b", "1xL40S", ("--set", "workload.tokens=3001", "--set", "levers.micro_batch=3")),
    ],
    ids=["shipped as it is", "played"],
)
def test_a_catalogued_model_needs_no_torch(tmp_path: Path, model: str, gpus: str, more: tuple[str, ...]) -> None:
    """How long that takes stands in docs/measured/cold_estimate.md: a bound in seconds would test the machine."""
    made = json.loads((DATA / "versions.json").read_text(encoding="utf-8"))
    if made != dict(installed_versions()):
        pytest.skip(f"the shipped numbers are of {made}, here is {dict(installed_versions())}")
    script = ESTIMATE.format(model=model, gpus=gpus, more="".join(f", {one!r}" for one in more))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            BLOCK + script,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "MEMFIT_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr + "\nrun python tools/catalog_data.py"
    data = json.loads(done.stdout)
    assert data["gpu"]["process_bytes"] > data["gpu"]["peak_reserved_bytes"] > data["gpu"]["peak_allocated_bytes"]
