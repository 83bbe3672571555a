"""The run: forecasts in processes beside, measurements one after the other, each in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy_gpu.cells import Cell, cells, hardware_of
from benchmarks.accuracy_gpu.records import FOLDER, read_record, write_record
from benchmarks.accuracy_gpu.table import line_of
from memfit.errors import MemfitError

CELL_SECONDS = 100.0  # one cell's budget: starting Python and torch, building, eight steps
LEAST_SECONDS = 15.0  # with less left no further cell is begun


@dataclass(frozen=True)
class Request:
    """What to run; `seconds` for all of it. `gpus` as a recipe names it, or auto."""

    rehearse: bool
    only: str
    seconds: float
    gpus: str
    out: Path | None
    workers: int


def drive(request: Request) -> int:
    """Run every cell. Returns 0 when each ran or was out of memory, 1 when one failed or was left out."""
    end = time.monotonic() + request.seconds
    wanted = cells(request.rehearse, request.only)
    try:
        gpus = "1xcpu" if request.rehearse else _gpu_name(request.gpus)
    except MemfitError as error:
        print(error, file=sys.stderr)
        return 1
    folder = (request.out or FOLDER) / _machine(gpus)
    print(f"{len(wanted)} cells on {gpus}, records in {folder}", flush=True)
    forecasts = _begin_forecasts(request, gpus, wanted, folder)
    worst = 0
    for cell in wanted:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            write_record(folder / f"{cell.id}.measured.json", _unrun(cell, "left out", "no time was left"))
        else:
            _measure(request, gpus, cell, folder, min(CELL_SECONDS, left))
        measured = read_record(folder / f"{cell.id}.measured.json") or _unrun(cell, "failed", "no record")
        worst |= measured["result"] not in ("ran", "out of memory")
        print(line_of(read_record(folder / f"{cell.id}.forecast.json"), measured), flush=True)
    for process in forecasts:
        try:
            process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            print("a forecast was not done in time", file=sys.stderr)
            worst = 1
    return int(worst)


def _begin_forecasts(
    request: Request, gpus: str, wanted: tuple[Cell, ...], folder: Path
) -> list[subprocess.Popen[bytes]]:
    """Start the forecasts of all cells, dealt out to the workers, without a GPU in sight."""
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    count = max(1, min(request.workers, len(wanted)))
    started = []
    for place in range(count):
        ids = [cell.id for cell in wanted[place::count]]
        started.append(subprocess.Popen(_command("forecast", ids, request, gpus, folder), env=hidden))
    return started


def _measure(request: Request, gpus: str, cell: Cell, folder: Path, seconds: float) -> None:
    """One cell in its own process. What it leaves out (killed, out of time) is written here."""
    path = folder / f"{cell.id}.measured.json"
    path.unlink(missing_ok=True)
    try:
        done = subprocess.run(_command("cell", [cell.id], request, gpus, folder), timeout=seconds, check=False)
        reason = f"the process ended with {done.returncode} and no record"
    except subprocess.TimeoutExpired:
        reason = f"stopped after {seconds:.0f} s"
    if not path.exists():
        write_record(path, _unrun(cell, "failed", reason))


def _command(kind: str, ids: list[str], request: Request, gpus: str, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.accuracy_gpu", kind, *ids, "--gpus", gpus, "--out", str(folder)]
    return [*command, "--rehearse"] if request.rehearse else command


def _gpu_name(gpus: str) -> str:
    """The GPU by its row's name, so that the forecasts, which see no GPU, mean the same card."""
    hardware = hardware_of(gpus)
    if hardware.gpu is None or hardware.gpu.verified == "detected":
        what = hardware.gpu.name if hardware.gpu else "no GPU"
        from memfit.errors import UserError

        raise UserError(
            f"this machine has {what}, of which the catalogue has no row",
            "name the nearest one with --gpus 1xH100-80G (see `memfit gpus`), or use --rehearse on a CPU",
        )
    return hardware.text


def _machine(gpus: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", gpus.removeprefix("1x"))


def _unrun(cell: Cell, result: str, reason: str) -> dict[str, object]:
    return {"cell": {"id": cell.id}, "result": result, "error": reason, "gpu": None}
