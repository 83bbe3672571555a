"""Forecast against a real GPU on two cells of the benchmark that take seconds; skipped without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.accuracy_gpu.cells import Cell
from benchmarks.accuracy_gpu.measure import measure
from benchmarks.accuracy_gpu.predict import predict
from benchmarks.accuracy_gpu.records import read_record
from benchmarks.accuracy_gpu.table import error_of, line_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

QUICK = (Cell("llama-3.2-1b", "lora", "full", 2048), Cell("minicpm-v-4.6", "lora", "full", 1024, 448))


@pytest.mark.parametrize("cell", QUICK, ids=lambda cell: cell.id)
def test_allocated_and_reserved(cell: Cell, tmp_path: Path) -> None:
    """Within the bounds that the CPU grid has to keep: 5% for what is allocated; reserved is allowed twice that."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    predict([cell], "auto", False, tmp_path)
    measure(cell, "auto", False, tmp_path)
    forecast, measured = (read_record(tmp_path / f"{cell.id}.{side}.json") for side in ("forecast", "measured"))
    assert measured is not None
    said = line_of(forecast, measured)
    assert measured["result"] == "ran", said
    allocated = error_of(forecast, measured, "peak_allocated_bytes")
    reserved = error_of(forecast, measured, "peak_reserved_bytes")
    assert allocated is not None, said
    assert abs(allocated) <= 0.05, said
    assert reserved is not None, said
    assert abs(reserved) <= 0.10, said
