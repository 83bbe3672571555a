"""Forecast against a GPU: `python -m benchmarks.accuracy_gpu`, under 9 minutes on one H100.

Needs torch, transformers, PEFT and accelerate, and nothing else that is not in this repository: no recipe files, no
weights, no network. Every cell runs in a process of its own with a time budget; its record is written when it ends.

    python -m benchmarks.accuracy_gpu                  measure on the first GPU, then `table`
    python -m benchmarks.accuracy_gpu --rehearse       the same way on the CPU with tiny models
    python -m benchmarks.accuracy_gpu table            docs/measured/accuracy_gpu.md from the records (--check compares)
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("rapidfuzz") is None:
    sys.path.append(str(Path(__file__).parent / "stand_ins"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", default="run", choices=("run", "table", "cell", "forecast"))
    parser.add_argument("ids", nargs="*", help="cell, forecast: ids (used by the run itself)")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--only", default="", help="cells whose id contains this")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for the whole run")
    parser.add_argument("--gpus", default="auto", help="the GPU as a recipe names it, such as 1xH100-80G")
    parser.add_argument("--out", type=Path, default=None, help="folder of the records")
    parser.add_argument("--workers", type=int, default=3, help="processes that forecast beside the measurements")
    parser.add_argument("--check", action="store_true", help="table: fail where the page is old")
    asked = parser.parse_args(arguments)
    if asked.command == "table":
        from benchmarks.accuracy_gpu.table import write_page

        return write_page(asked.check)
    if asked.command == "run":
        from benchmarks.accuracy_gpu.drive import Request, drive

        return drive(Request(asked.rehearse, asked.only, asked.minutes * 60, asked.gpus, asked.out, asked.workers))
    from benchmarks.accuracy_gpu.cells import cells

    wanted = [cell for cell in cells(asked.rehearse) if cell.id in asked.ids]
    if asked.command == "forecast":
        from benchmarks.accuracy_gpu.predict import predict

        predict(wanted, asked.gpus, asked.rehearse, asked.out)
    else:
        from benchmarks.accuracy_gpu.measure import measure

        measure(wanted[0], asked.gpus, asked.rehearse, asked.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
