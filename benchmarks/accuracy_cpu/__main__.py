"""Forecast and measure every cell of both grids, write the records and the page, and judge them.

    python -m benchmarks.accuracy_cpu                      # all cells: two hours on two cores
    python -m benchmarks.accuracy_cpu --cells c03,c10..c19 # some; the other records stay
    python -m benchmarks.accuracy_cpu --resume             # forecast all again, measure what has no measurement
    python -m benchmarks.accuracy_cpu --measure-only       # leave the forecasts for a later --resume
    python -m benchmarks.accuracy_cpu --judge [--plant saved=1.1]   # only judge the records

Exit 1 when a limit is broken. Needs the `deepspeed` extra (DeepSpeed, which compiles two operators on first use).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy_cpu.grid import GRIDS, Cell, read_cells
from benchmarks.accuracy_cpu.models import KINDS, make_model
from benchmarks.accuracy_cpu.recorder import environment
from benchmarks.accuracy_cpu.records import Judged, judge, read_records, verdict, write_records
from benchmarks.accuracy_cpu.table import PAGE, Section, page

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed")
LONGEST = 900  # seconds for one cell
LAST_LINES = 3


def main() -> None:
    """See the module."""
    options = _options()
    cells = read_cells()
    records = {record["id"]: record for record in read_records() if _is_of(record, cells)}
    if not options.judge:
        os.environ["MEMFIT_CACHE"] = str(options.work / f"cache-{os.getpid()}")  # no forecast of an older memfit
        for kind in KINDS:
            make_model(kind, options.work / kind)
        for cell in _chosen(options.cells, cells):
            old = records.get(cell.id) if options.resume else None
            records[cell.id] = _record(cell, options.work, old, forecast=not options.measure_only)
            write_records(records.values())
            _say(judge(records[cell.id]))
    sections = []
    for grid in GRIDS:
        judged = [judge(record, options.plant) for name, record in sorted(records.items()) if name[0] == grid.letter]
        if judged:
            sections.append(Section(grid, judged, verdict(judged)))
    if options.plant is None and records:
        versions = {name: text for record in records.values() for name, text in record["versions"].items()}
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(sections, versions), encoding="utf-8")
    for section in sections:
        _say_verdict(section)
    sys.exit(any(section.found.red for section in sections))


def _is_of(record: dict[str, Any], cells: dict[str, Cell]) -> bool:
    """Whether a record is of a cell as it stands in its grid."""
    return record["id"] in cells and record["cell"] == _plain(cells[record["id"]])


def _say_verdict(section: Section) -> None:
    found = section.found
    print(section.grid.title)
    for name, count, median, high, largest in found.rows:
        print(f"{name:10s} {count:3d} cells  median {median:8.4%}  95th percentile {high:8.4%}  largest {largest:9.4%}")
    print(f"states exact in {found.exact} of {found.exact + len(found.inexact)}, {len(found.refused)} refused")
    if found.coverage is not None:
        print(f"the interval covers {found.coverage:.0%}")
    for line in found.red:
        print(f"red: {line}")


def _record(cell: Cell, work: Path, old: dict[str, Any] | None, forecast: bool) -> dict[str, Any]:
    """Forecast, then measure unless `old` holds a measurement."""
    from benchmarks.accuracy_cpu.predict import predict, refusal

    predicted = (predict(cell, work) if forecast else refusal("not forecast yet")).to_json()
    record = {"id": cell.id, "cell": _plain(cell), "predicted": predicted}
    if old is not None and old["measured"]:
        kept = {key: old[key] for key in ("measured", "not_measured", "seconds", "versions")}
        return json.loads(json.dumps(record | kept))
    start = time.perf_counter()
    measured, problem = measured_ranks(cell, work)
    more = {"measured": measured, "not_measured": problem, "seconds": round(time.perf_counter() - start, 1)}
    return json.loads(json.dumps(record | more | {"versions": versions()}))


def measured_ranks(cell: Cell, work: Path) -> tuple[list[dict[str, Any]] | None, str | None]:
    """The figures of every rank, each from a fresh process; or the last lines of what went wrong."""
    (work / f"{cell.id}.meeting").unlink(missing_ok=True)
    outs = [work / f"{cell.id}.{rank}.json" for rank in range(cell.ranks)]
    logs = [out.with_suffix(".log") for out in outs]
    running = []
    for rank, (out, log) in enumerate(zip(outs, logs, strict=True)):
        out.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.accuracy_cpu.measure", cell.id]
        command += ["--work", str(work), "--out", str(out), "--rank", str(rank)]
        values = _environment(work)
        if cell.ranks > 1:
            command += ["--records", str(out.with_suffix(".records"))]
            values |= environment(work, out.with_suffix(".records"))
        with log.open("w") as file:
            running.append(subprocess.Popen(command, stdout=file, stderr=file, env=values))
    try:
        for process in running:
            process.wait(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return None, f"took longer than {LONGEST} s"
    finally:
        for process in running:
            process.kill()
    if all(out.exists() for out in outs):
        return [json.loads(out.read_text(encoding="utf-8")) for out in outs], None
    failed = next(log for out, log in zip(outs, logs, strict=True) if not out.exists())
    return None, _problem(failed.read_text(encoding="utf-8"))


def _problem(log: str) -> str:
    """The last lines that say something; memfit's own refusals are one line."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("USDT")]
    return " / ".join(line for line in lines[-LAST_LINES:])[-400:]


def _environment(work: Path) -> dict[str, str]:
    """One thread a rank; DeepSpeed on the CPU, its operators compiled once."""
    values = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    values["TORCH_EXTENSIONS_DIR"] = os.environ.get("TORCH_EXTENSIONS_DIR", str(work / "extensions"))
    # Its compiler driver ninja lies beside the interpreter.
    return os.environ | values | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def versions() -> dict[str, str]:
    """Of the packages whose code was measured."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _plain(cell: Cell) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(cell)))


def _chosen(text: str | None, cells: dict[str, Cell]) -> Sequence[Cell]:
    if text is None:
        return tuple(cells.values())
    names = []
    for item in text.split(","):
        first, dots, last = item.partition("..")
        names += [name for name in cells if first <= name <= last] if dots else [first]
    return tuple(cells[name] for name in names)


def _say(one: Judged) -> None:
    errors = "  ".join(f"{name} {error:+.2%}" for name, error in one.errors.items() if error is not None)
    print(f"{one.id}: {errors}  exact {one.exact}" + (f"  refused: {one.refused}" if one.refused else ""), flush=True)


def _plant(text: str) -> tuple[str, float]:
    name, _, factor = text.partition("=")
    return name, float(factor)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", help="c03,c10..c19")
    parser.add_argument("--resume", action="store_true", help="keep the measurements that are there")
    parser.add_argument("--measure-only", action="store_true", help="forecast nothing yet")
    parser.add_argument("--judge", action="store_true", help="run nothing")
    parser.add_argument("--plant", type=_plant, help="TERM=1.1: the check has to turn red")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "memfit-accuracy-cpu")
    options = parser.parse_args()
    options.judge = options.judge or options.plant is not None
    options.work.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
