"""The demo, from slips to a report: every step is a `memfit` command that a user would type.

    python demo/run.py                  # one seed
    python demo/run.py --seeds 0 1 2    # the same under three seeds, one after another

The slips are drawn first (demo/slips.py); from there on nothing knows that this is a demo.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = Path("demo/data")
RECIPE = "recipes/demo.yaml"
TRAIN_SLIPS, HELDOUT_SLIPS = 7200, 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one training run a seed")
    seeds = parser.parse_args().seeds
    began = time.monotonic()
    draw_slips()
    step("1. Is the data sound?", "check", RECIPE)
    step("2. What will it need?", "estimate", RECIPE)
    runs = []
    for seed in seeds:
        runs.append(train(seed))
        evaluate(runs[-1])
    step("5. The report", "report", *runs)
    for run in runs:
        tell_scores(run)
    print(f"\nThe whole demo took {(time.monotonic() - began) / 60:.1f} minutes.")
    page = "report.html" if len(runs) == 1 else "side-by-side.html"
    print(f"Open {runs[0]}/{page} in a browser. Next: put your own model and data into {RECIPE}.")
    return 0


def draw_slips() -> None:
    """Handwritten slips to learn from and to be judged on, and printed ones to see what is forgotten."""
    jobs = (
        ("handwritten", "train", TRAIN_SLIPS, 1),
        ("handwritten", "heldout", HELDOUT_SLIPS, 2),
        ("printed", "heldout", HELDOUT_SLIPS, 3),
    )
    for hand, split, count, seed in jobs:
        folder = DATA / f"{hand}-{split}"
        # Glyphs bent as far as the generator can would take longer to learn than the demo has.
        options = ["--hand", hand, "--split", split, "--count", str(count), "--seed", str(seed), "--vary", "0.6"]
        run([sys.executable, "demo/slips.py", "--out", str(folder), *options])


def train(seed: int) -> str:
    """Fine-tune under one seed; returns the run folder."""
    arguments = ("train", RECIPE, "--set", f"seed={seed}", "--set", f"run.folder={free_folder(seed)}", "--json")
    result: dict[str, str] = json.loads(step("3. Fine-tune", *arguments, shown=False))
    return result["folder"]


def free_folder(seed: int) -> Path:
    """runs/demo-seed0, or the first with a number behind it that is not there yet."""
    folder, number = Path(f"runs/demo-seed{seed}"), 1
    while (ROOT / folder).exists():
        number += 1
        folder = Path(f"runs/demo-seed{seed}-{number}")
    return folder


def evaluate(folder: str) -> None:
    """Judge one run on new handwriting, with the two controls, and on printed slips."""
    printed = str(DATA / "printed-heldout/data.json")
    heldout = ("eval", folder, "--data", str(DATA / "handwritten-heldout/data.json"))
    step("4. Before and after, on handwriting never seen in training", *heldout, "--base")
    step("   Control: with another slip's picture", *heldout, "--images", "shuffled", "--name", "tuned-shuffled")
    step("   Control: with a blank picture", *heldout, "--images", "blank", "--name", "tuned-blank")
    step("   What was forgotten: printed slips", "eval", folder, "--data", printed, "--base", "--name", "tuned-printed")


def tell_scores(folder: str) -> None:
    """The headline of every evaluation in a run folder, one line each."""
    print(f"\n{folder}: micro-F1 of the fields")
    for file in sorted((ROOT / folder / "eval").glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.get("kind") == "evaluation":
            f1 = content["normalised"]["scores"]["micro_f1"]
            print(f"  {file.stem:<24}{f1['value']:.3f}  (95% interval {f1['low']:.3f} to {f1['high']:.3f})")


def step(title: str, *arguments: str, shown: bool = True) -> str:
    """Print a title and the command, run it, and return what it printed."""
    print(f"\n{title}\n$ memfit {' '.join(arguments)}\n", flush=True)
    return run([sys.executable, "-m", "memfit", *arguments], shown)


def run(command: list[str], shown: bool = True) -> str:
    """Run a command from the project's root with its progress shown; stop the demo with its exit code if it fails."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if shown or done.returncode:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
