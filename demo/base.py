"""Train the demo's base model from nothing on printed slips: the curriculum of stages.py, through memfit itself.

    python demo/base.py [--out demo/model] [--work FOLDER] [--seed 0]

Every round draws new slips, trains with recipes/base.yaml from the weights of the round before, and reads 200
held-out printed slips of the same kind. A line a round goes to demo/base_log.jsonl. The model folder is
replaced only when the last stage has reached its target.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from make_model import write_model
from slips import Form, write_slips
from stages import STAGES, TARGET, Stage

import memfit
from memfit.specs.evaluate import EvaluateRequest

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "recipes" / "base.yaml"
LOG = HERE / "base_log.jsonl"
HELDOUT = 200


def train_round(stage: Stage, model: Path, work: Path, seed: int) -> tuple[Path, dict[str, Any]]:
    """One training run of a stage from ``model``; returns the new weights' folder and its line of the log."""
    train = write_slips(work / "train", stage.form, stage.slips, seed)
    heldout = dataclasses.replace(stage.form, split="heldout")
    test = write_slips(work / "heldout", heldout, HELDOUT, seed)
    settings = {
        "model": model,
        "data.train": train,
        "data.eval": "null",
        "schedule.learning_rate": stage.learning_rate,
        "seed": seed,
        "run.folder": work / "run",
    }
    began = time.monotonic()
    done = memfit.train(RECIPE, sets=[f"{key}={value}" for key, value in settings.items()], say=tell)
    seconds = time.monotonic() - began
    scores = heldout_scores(done.folder, test)
    return done.folder / "model", {
        "seed": seed,
        "stage": stage.name,
        "form": dataclasses.asdict(stage.form),
        "slips": stage.slips,
        "steps": done.steps,
        "learning_rate": stage.learning_rate,
        "seconds": round(seconds, 1),
        "loss": done.loss,
        **scores,
    }


def heldout_scores(run: Path, data: Path) -> dict[str, float | None]:
    """Share of slips without a mistake and micro-F1 of the fields, values compared as they stand."""
    result = memfit.evaluate(EvaluateRequest(run_or_model=str(run), data=data))
    scores = result.evaluations[0].strict.scores
    return {"exact": scores["exact"].value, "field_f1": scores["micro_f1"].value}


def train_stages(work: Path, seed: int, log: Path) -> Path | None:
    """All stages; returns the folder of the last weights, or None when a stage stayed below its target."""
    model = work / "untrained"
    write_model(model, seed)
    log.unlink(missing_ok=True)
    for number, stage in enumerate(STAGES):
        for attempt in range(stage.rounds):
            folder = work / f"{number}-{attempt}"
            model, line = train_round(stage, model, folder, seed + 1000 * number + 100 * attempt)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            tell(f"{stage.name}, round {attempt + 1}: exact {line['exact']:.3f}, field F1 {line['field_f1']:.3f}")
            if line["exact"] >= TARGET:
                break
        else:
            tell(f"stage {stage.name!r} stayed below {TARGET} after {stage.rounds} rounds; see {log}")
            return None
    return model


def final_scores(model: Path, work: Path) -> dict[str, float | None]:
    """Field F1 of a model folder on held-out slips of both hands."""
    scores: dict[str, float | None] = {}
    for hand in ("printed", "handwritten"):
        data = write_slips(work / hand, Form(hand=hand, split="heldout"), HELDOUT, seed=3)
        request = EvaluateRequest(run_or_model=str(model), data=data)
        scores[hand] = memfit.evaluate(request).evaluations[0].strict.scores["micro_f1"].value
    return scores


def tell(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the demo's base model from nothing on printed slips.")
    parser.add_argument("--out", type=Path, default=HERE / "model", help="model folder to write")
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--work", type=Path, help="where slips and runs go; a temporary folder when left out")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="base-") as temporary:
        work = given.work or Path(temporary)
        began = time.monotonic()
        trained = train_stages(work, given.seed, given.log)
        if trained is None:
            return 1
        scores = final_scores(trained, work)
        tell(f"held-out field F1: {json.dumps(scores)}; {(time.monotonic() - began) / 60:.1f} minutes")
        if given.out.exists():
            shutil.rmtree(given.out)
        shutil.copytree(trained, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
