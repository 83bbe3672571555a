"""The GPU benchmark, as far as a CPU shows it: it runs with nothing but torch's stack, and every end is a record."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.accuracy_gpu.measure as measuring
from benchmarks.accuracy_gpu.cells import CELLS, REHEARSED, batch_of, facts_of, prepared_of
from benchmarks.accuracy_gpu.drive import Request, _measure
from benchmarks.accuracy_gpu.measure import measure
from benchmarks.accuracy_gpu.predict import predict
from benchmarks.accuracy_gpu.records import read_record, write_record
from benchmarks.accuracy_gpu.table import error_of, line_of, page_text, write_page

ROOT = Path(__file__).parents[2]
# What a GPU machine may lack. Blocked as if it were not installed, in every process of the run.
LACKING = ("pydantic", "pydantic_core", "ruamel", "typer", "rich", "rapidfuzz", "psutil", "scipy", "json_repair")
BLOCK = f"""
import importlib.util, sys

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LACKING!r}:
            stand_in = next((entry for entry in sys.path if "stand_ins" in entry), None)
            if stand_in is None or not name.startswith("rapidfuzz"):
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
            from importlib.machinery import PathFinder
            return PathFinder.find_spec(name, path or [stand_in])

found = importlib.util.find_spec

def find_spec(name, package=None):  # answers None for what is lacking, as it does where nothing is installed
    try:
        return found(name, package)
    except ModuleNotFoundError:
        return None

importlib.util.find_spec = find_spec
sys.meta_path.insert(0, Lacking())
"""


def test_the_issue_s_grid_is_covered() -> None:
    found = {(cell.model, cell.what) for cell in CELLS}
    for model in ("minicpm-v-4.6", "qwen2.5-vl-3b"):
        assert {(model, what) for what in ("lora", "frozen-vision", "full")} <= found
        assert len({cell.side for cell in CELLS if cell.model == model}) == 2
    for model in {cell.model for cell in CELLS}:
        assert {cell.checkpointing for cell in CELLS if cell.model == model} == {"none", "full"}
        assert len({cell.tokens for cell in CELLS if cell.model == model}) == 2
    assert len({cell.id for cell in CELLS}) == len(CELLS)


def test_crops_of_the_grid() -> None:
    crops = {}
    for cell in CELLS:
        if cell.model == "minicpm-v-4.6":
            prepared, _ = prepared_of(cell, "1xH100-80G", False)
            crops[cell.side] = facts_of(cell, prepared)["crops"]
            assert sum(cost.tokens for cost in batch_of(cell, prepared).images[0]) < cell.tokens
    assert crops == {448: 1, 1344: 10}


@pytest.mark.parametrize("cell", REHEARSED, ids=lambda cell: cell.id)
def test_a_cell_and_its_forecast(cell: Any, tmp_path: Path) -> None:
    predict([cell], "1xcpu", True, tmp_path)
    measure(cell, "1xcpu", True, tmp_path)
    forecast, measured = (read_record(tmp_path / f"{cell.id}.{side}.json") for side in ("forecast", "measured"))
    assert forecast is not None
    assert measured is not None
    assert "error" not in forecast
    assert measured["result"] == "ran"
    assert measured["gpu"] is None
    assert measured["cell"] == forecast["cell"]
    assert measured["step_seconds"] > 0
    assert (measured["checkpointed"] != {}) == (cell.checkpointing != "none")
    assert cell.id in line_of(forecast, measured)


def test_out_of_memory_is_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(measuring, "_run", full)
    cell = REHEARSED[1]
    measure(cell, "1xcpu", True, tmp_path)
    record = read_record(tmp_path / f"{cell.id}.measured.json")
    assert record is not None
    assert record["result"] == "out of memory"
    assert "3.00 GiB" in record["error"]
    assert "NOT forecast" in line_of({"fits": True, "gpu": None}, record)
    assert "NOT forecast" not in line_of({"fits": False, "gpu": None}, record)


def test_a_failure_is_a_record_and_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("mine")

    monkeypatch.setattr(measuring, "_run", broken)
    with pytest.raises(RuntimeError, match="mine"):
        measure(REHEARSED[1], "1xcpu", True, tmp_path)
    record = read_record(tmp_path / f"{REHEARSED[1].id}.measured.json")
    assert record is not None
    assert record["result"] == "failed"


def test_a_cell_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    request = Request(True, "", 60, "1xcpu", tmp_path, 1)
    _measure(request, "1xcpu", REHEARSED[1], tmp_path, 0.2)
    record = read_record(tmp_path / f"{REHEARSED[1].id}.measured.json")
    assert record is not None
    assert (record["result"], record["error"]) == ("failed", "stopped after 0 s")


def records(folder: Path, factor: float = 1.0) -> None:
    """Two cells as a GPU would leave them: one ran, one was out of memory."""
    gpu = {"peak_allocated_bytes": 10 << 30, "peak_reserved_bytes": 12 << 30, "process_bytes": None}
    device = {"kind": "gpu", "name": "A card", "cuda": "12.8"}
    ran = {"cell": {"id": "a"}, "device": device, "versions": {"torch": "2.11"}, "result": "ran", "step_seconds": 0.5}
    write_record(folder / "card" / "a.measured.json", {**ran, "gpu": gpu | {"device_used_bytes": 13 << 30}})
    forecast = {name: int(factor * (size or 13 << 30)) for name, size in gpu.items()}
    write_record(folder / "card" / "a.forecast.json", {"gpu": forecast, "fits": True, "speed": None})
    write_record(
        folder / "card" / "b.measured.json",
        {"cell": {"id": "b"}, "device": device, "result": "out of memory", "error": "no", "gpu": gpu},
    )


def test_the_page(tmp_path: Path) -> None:
    assert "No measurement on a GPU has been taken yet." in page_text(tmp_path)
    records(tmp_path)
    text = page_text(tmp_path)
    assert "## A card" in text
    assert "| a | ran | 10.00 GiB / 10.00 GiB / +0.0% | 12.00 GiB / 12.00 GiB / +0.0% |" in text
    assert "| b | out of memory (NOT forecast) | - / - / - |" in text
    assert "allocated: median absolute error 0.0%" in text
    page = tmp_path / "page.md"
    assert write_page(True, tmp_path, page) == 1
    assert write_page(False, tmp_path, page) == 0
    assert write_page(True, tmp_path, page) == 0


def test_a_planted_error_is_shown(tmp_path: Path) -> None:
    records(tmp_path, factor=1.1)
    forecast, measured = (read_record(tmp_path / "card" / f"a.{side}.json") for side in ("forecast", "measured"))
    assert measured is not None
    assert error_of(forecast, measured, "peak_allocated_bytes") == pytest.approx(0.1, abs=1e-6)
    assert error_of(forecast, measured, "process_bytes") == pytest.approx(0.1, abs=1e-6)
    assert "+10.0%" in page_text(tmp_path)


def test_the_written_page_is_what_the_records_give() -> None:
    assert write_page(check=True) == 0, "run python -m benchmarks.accuracy_gpu table"


def test_the_rehearsal_needs_nothing_but_torchs_stack(tmp_path: Path) -> None:
    """One command, in processes that lack pydantic, ruamel, typer, rich, rapidfuzz and psutil."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "MEMFIT_CACHE": str(tmp_path / "cache")}
    lacking = subprocess.run(
        [sys.executable, "-c", "import pydantic"], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert lacking.returncode != 0
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accuracy_gpu", "--rehearse", "--only", "llama", "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "llama-3.1-8b-full-none-64t: ran" in done.stdout
    names = {path.name for path in (tmp_path / "cpu").iterdir()}
    assert names == {f"{REHEARSED[1].id}.{side}.json" for side in ("forecast", "measured")}
