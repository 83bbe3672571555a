"""How long a forecast takes from nothing: an uncatalogued model of 8 B, a fresh process, an empty cache, one core.

    python -m benchmarks.cold_estimate [--core 0]     # writes docs/measured/cold_estimate.md

Each model is a catalogued one with one number of its config changed that no size follows from, so that nothing that
memfit ships serves. Runs are interleaved; beside each stands how long a loop of plain Python took just before it, which
says how fast the machine was at that moment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "measured" / "cold_estimate.md"
MODELS = ("qwen2.5-vl-7b", "minicpm-v-2.6", "minicpm-v-4.6")
METHODS = ("lora", "full")
REPEATS = 3
GOAL = 10.0  # seconds
CHANGED = "model_config.bos_token_id=7"  # an id; no size follows from it
LOOP = 5_000_000
IMPORTS = ("-c", "import torch, transformers.modeling_utils, peft")


class Run(NamedTuple):
    """Seconds by the clock and of the processor, and those of the loop before."""

    wall: float
    cpu: float
    loop: float


def commands() -> dict[tuple[str, str], tuple[str, ...]]:
    """What is run: (model, method) -> arguments of Python. The first is the imports alone."""
    found: dict[tuple[str, str], tuple[str, ...]] = {("imports alone", ""): IMPORTS}
    for model in MODELS:
        for method in METHODS:
            sets = ("--set", f"method={method}", "--set", CHANGED, "--gpus", "1xH100-80G", "--json")
            found[(model, method)] = ("-m", "memfit", "estimate", "--model", model, *sets)
    return found


def run(arguments: Sequence[str]) -> Run:
    """One fresh process with an empty cache. Raises RuntimeError where it fails (3, "does not fit", is an answer)."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"MEMFIT_CACHE": cache, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        loop = _loop_seconds()
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr[-500:]}")
    return Run(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, loop)


def _loop_seconds() -> float:
    start, total = time.perf_counter(), 0
    for number in range(LOOP):
        total += number
    return time.perf_counter() - start


def page(runs: dict[tuple[str, str], list[Run]]) -> str:
    """The record as Markdown."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    lines = [
        "# Seconds of a forecast from nothing",
        "",
        "Written by `python -m benchmarks.cold_estimate`: `memfit estimate` of catalogued models made strange",
        f"(`{CHANGED}`), in fresh processes with an empty cache on one core; medians of {REPEATS} interleaved",
        f"runs. The goal is {GOAL:.0f} s.",
        f"Python {platform.python_version()}, {versions}; {_processor()}.",
        f"The loop is {LOOP:,} additions in plain Python, timed before each run: the machine's speed at that moment.",
        "",
        "| model | method | seconds | of the processor | fastest to slowest | loop s |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for (model, method), rows in runs.items():
        walls = [row.wall for row in rows]
        middle = [f"{median(column):.1f}" for column in (walls, [row.cpu for row in rows])]
        spread, loop = f"{min(walls):.1f} to {max(walls):.1f}", f"{median(row.loop for row in rows):.2f}"
        lines.append(f"| {model} | {method} | {middle[0]} | {middle[1]} | {spread} | {loop} |")
    return "\n".join(lines) + "\n"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    core = parser.parse_args().core
    os.sched_setaffinity(0, {core})  # children run where their parent does
    runs: dict[tuple[str, str], list[Run]] = {}
    for _ in range(REPEATS):
        for key, arguments in commands().items():
            runs.setdefault(key, []).append(run(arguments))
            print(*key, f"{runs[key][-1].wall:.1f} s", flush=True)
    PAGE.write_text(page(runs), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
