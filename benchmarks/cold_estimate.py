"""How long a forecast takes in a fresh process on one core: from nothing, and where something is known already.

    python -m benchmarks.cold_estimate [--core 0]     # writes docs/measured/cold_estimate.md

From nothing is a catalogued model with one number of its config changed that no size follows from, and an empty cache,
so that nothing that memfit ships serves. Runs are interleaved; beside each stands how long a loop of plain Python took
just before it, which says how fast the machine was at that moment.
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
KNOWN_MODELS = ("minicpm-v-2.6", "llama-3.1-8b")
REPEATS = 3
GOAL, KNOWN_GOAL = 10.0, 1.0  # seconds: from nothing, and where the answer is shipped, played or cached
CHANGED = "model_config.bos_token_id=7"  # an id; no size follows from it
LOOP = 5_000_000
IMPORTS = ("-c", "import torch, transformers.modeling_utils, peft")
# The command, and on its last line of stderr whether torch or transformers came in.
ASKED = """
import sys
from memfit.cli import main
code = main()
print(*sorted({"torch", "transformers"} & set(sys.modules)) or ["neither"], file=sys.stderr)
sys.exit(code)
"""
# Neither this length nor this card is shipped, and three rows are not: the tape is played, the allocator replayed.
OTHER = ("--set", "workload.tokens=3001", "--set", "levers.micro_batch=3", "--gpus", "1xL40S")
SHIPPED, PLAYED, CACHED = "shipped", "played from a tape", "cached"

HEADS = "seconds | of the processor | fastest to slowest | loop s | loops"


class Run(NamedTuple):
    """Seconds by the clock and of the processor, and those of the loop before. `imported`: what came in of torch and
    transformers, where it was asked."""

    wall: float
    cpu: float
    loop: float
    imported: str = ""


def known_commands() -> dict[tuple[str, str, str], tuple[str, ...]]:
    """(model, method, what is known) -> arguments of Python."""
    found: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for model in KNOWN_MODELS:
        for method in METHODS:
            asked = ("-c", ASKED, "estimate", "--model", model, "--set", f"method={method}", "--json")
            found[(model, method, SHIPPED)] = (*asked, "--gpus", "1xRTX4090")
            found[(model, method, PLAYED)] = (*asked, *OTHER)
        strange = ("--set", f"method={METHODS[0]}", "--set", CHANGED)
        found[(model, METHODS[0], CACHED)] = ("-c", ASKED, "estimate", "--model", model, *strange, "--json", *OTHER)
    return found


def commands() -> dict[tuple[str, str], tuple[str, ...]]:
    """What is run: (model, method) -> arguments of Python. The first is the imports alone."""
    found: dict[tuple[str, str], tuple[str, ...]] = {("imports alone", ""): IMPORTS}
    for model in MODELS:
        for method in METHODS:
            sets = ("--set", f"method={method}", "--set", CHANGED, "--gpus", "1xH100-80G", "--json")
            found[(model, method)] = ("-m", "memfit", "estimate", "--model", model, *sets)
    return found


def run(arguments: Sequence[str], cache: str | None = None) -> Run:
    """One fresh process with this cache, or an empty one.

    Raises RuntimeError where it fails (3, "does not fit", is an answer).
    """
    if cache is None:
        with tempfile.TemporaryDirectory() as empty:
            return run(arguments, empty)
    environment = os.environ | {"MEMFIT_CACHE": cache, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    loop = _loop_seconds()
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr[-500:]}")
    imported = done.stderr.splitlines()[-1] if ASKED in arguments else ""
    return Run(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, loop, imported)


def _loop_seconds() -> float:
    start, total = time.perf_counter(), 0
    for number in range(LOOP):
        total += number
    return time.perf_counter() - start


def page(runs: dict[tuple[str, str], list[Run]], known: dict[tuple[str, str, str], list[Run]]) -> str:
    """The record as Markdown."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    lines = [
        "# Seconds of a forecast in a fresh process",
        "",
        f"Written by `python -m benchmarks.cold_estimate`: `memfit estimate` on one core; medians of {REPEATS}",
        "interleaved runs.",
        f"Python {platform.python_version()}, {versions}; {_processor()}.",
        f"The loop is {LOOP:,} additions in plain Python, timed before each run: the machine's speed at that moment.",
        "Where others use the machine, compare loops: how many of them a run took.",
        "",
        "## From nothing",
        "",
        f"Catalogued models made strange (`{CHANGED}`), an empty cache. The goal for a model of",
        f"8 B is {GOAL:.0f} s.",
        "",
        f"| model | method | {HEADS} |",
        "|---|---|--:|--:|--:|--:|--:|",
        *(f"| {model} | {method} | {_figures(rows)} |" for (model, method), rows in runs.items()),
        "",
        "## Where something is known",
        "",
        f"The goal is {KNOWN_GOAL:.0f} s, without torch or transformers. Shipped: a step and a card that memfit ships,",
        f"an empty cache. Played: `{' '.join(OTHER)}`,",
        "of which nothing but the tape is shipped, an empty cache. Cached: the same of a strange model, asked before.",
        "",
        f"| model | method | known | {HEADS} | imported |",
        "|---|---|---|--:|--:|--:|--:|--:|---|",
        *(
            f"| {' | '.join(key)} | {_figures(rows)} | {', '.join(sorted({row.imported for row in rows}))} |"
            for key, rows in known.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _figures(rows: Sequence[Run]) -> str:
    walls = [row.wall for row in rows]
    middle = f"{median(walls):.1f} | {median(row.cpu for row in rows):.1f}"
    loops = f"{median(row.loop for row in rows):.2f} | {median(row.wall / row.loop for row in rows):.0f}"
    return f"{middle} | {min(walls):.1f} to {max(walls):.1f} | {loops}"


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
    known: dict[tuple[str, str, str], list[Run]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for which, arguments in known_commands().items():
            if which[2] == CACHED:
                run(arguments, cache)
        for _ in range(REPEATS):
            for key, arguments in commands().items():
                runs.setdefault(key, []).append(run(arguments))
                print(*key, f"{runs[key][-1].wall:.1f} s", flush=True)
            for which, arguments in known_commands().items():
                known.setdefault(which, []).append(run(arguments, cache if which[2] == CACHED else None))
                print(*which, f"{known[which][-1].wall:.1f} s", flush=True)
    PAGE.write_text(page(runs, known), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
