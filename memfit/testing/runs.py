"""Run folders as memfit writes them, with made-up figures: for tests of the report, and to look at its page.

python -m memfit.testing.runs FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from memfit.evaluation.results import compare, score
from memfit.specs.evaluation import Document, Evaluation
from memfit.specs.recipe import Data, Recipe, Schedule

MIB = 1 << 20


def make_run(folder: Path, seed: int = 0, accuracy: float = 0.97, steps: int = 375, documents: int = 120) -> Path:
    """A finished, evaluated run with base, tuned, two controls, and printed pages; pictures under folder/../pages."""
    folder.mkdir(parents=True)
    write(folder / "plan.json", plan(seed))
    write(folder / "data.json", {"train": 6000, "eval": documents, "broken": [], "split": {"by": "file"}})
    (folder / "run.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events(seed, steps)), encoding="utf-8")
    pictures = folder.parent / "pages"
    pairs = [
        ("base", "scanned", 0.55, "as-is"),
        ("tuned", "scanned", accuracy, "as-is"),
        ("tuned-shuffled", "scanned", 0.1, "shuffled"),
        ("tuned-blank", "scanned", 0.06, "blank"),
        ("base-printed", "printed", 0.995, "as-is"),
        ("tuned-printed", "printed", 0.9, "as-is"),
    ]
    found: dict[str, Evaluation] = {}
    for name, hand, digits, images in pairs:
        answered = answers(pictures / hand, documents, digits, f"{seed}-{name}")
        found[name] = dataclasses.replace(
            score(answered, seed=seed, resamples=200),
            name=name,
            model="data/model" if name.startswith("base") else str(folder / "model"),
            data=f"data/data/{hand}-heldout/data.json",
            images=images,
            settings={"max_new_tokens": 64},
        )
        write(folder / "eval" / f"{name}.json", found[name].to_json())
    for mark in ("", "-printed"):
        pair = compare(found[f"base{mark}"], found[f"tuned{mark}"], seed=seed, resamples=200)
        write(folder / "eval" / f"comparison{mark and '-tuned' + mark}.json", pair.to_json())
    return folder


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def plan(seed: int) -> dict[str, Any]:
    """plan.json of a CPU run in which the states are forecast and nothing else."""
    recipe = dataclasses.replace(
        Recipe(model="data/model"),
        data=Data(train="data/data/scanned-train/data.json", eval="data/data/scanned-heldout/data.json"),
        parts={"vision": "full", "connector": "full", "language": "full", "head": "full"},
        schedule=Schedule(epochs=1, learning_rate=5e-4, warmup=0.05),
        batch=16,
        seed=seed,
    ).to_json()
    alive = ["load", "forward", "loss", "backward", "step", "evaluate", "save"]
    sizes = {"weights": 14.2, "gradients": 14.2, "optimizer": 28.4}
    names = {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer states"}
    terms: list[dict[str, Any]] = [
        {
            "id": f"{kind}.{part}",
            "name": f"{names[kind]}, {part}",
            "part": part,
            "place": "host",
            "alive": alive,
            "bytes": int(size * share * MIB),
            "source": "counted",
            "formula": "",
        }
        for kind, size in sizes.items()
        for part, share in (("vision", 0.4), ("language", 0.6))
    ]
    states = sum(term["bytes"] for term in terms)
    return {
        "recipe": recipe,
        "layout": {"name": "none"},
        "tier": 1,
        "reasons": ["pinned by the recipe"],
        "forecast": {
            "schema": 1,
            "verdict": "unknown",
            "fits": None,
            "gpu": None,
            "host": {
                "peak_bytes": None,
                "pinned_bytes": None,
                "capacity_bytes": None,
                "terms": terms,
                "states_bytes": {**dict.fromkeys(alive, states // 2), "step": states},
            },
            "speed": None,
            "missing": ["activations", "logits and loss", "host memory beyond states", "disk", "speed"],
        },
    }


def events(seed: int, steps: int) -> list[dict[str, Any]]:
    """run.jsonl: start, one row a step, evaluations and saves, end."""
    chance = random.Random(seed)
    rows: list[dict[str, Any]] = [
        {
            "event": "start",
            "time": 1.76e9,
            "versions": {"python": "3.11.9", "torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.19.1"},
            "hardware": "1xcpu",
            "threads": 2,
            "samples": 6000,
            "eval_samples": 200,
            "total_steps": steps,
            "accumulation": 1,
            "trainable": {"vision": 1_480_000, "connector": 260_000, "language": 1_970_000},
            "pilot": False,
            "seed": seed,
        }
    ]
    for step in range(1, steps + 1):
        warm, done = min(1.0, step / (0.05 * steps)), step / steps
        rate = 5e-4 * warm * (0.5 + 0.5 * math.cos(math.pi * done))
        loss = (2.1 * math.exp(-6 * done) + 0.045) * math.exp(chance.gauss(0, 0.22))
        rows.append(
            {
                "event": "step",
                "time": 1.76e9 + step * 0.55,
                "step": step,
                "epoch": round(done, 4),
                "loss": round(loss, 5),
                "grad_norm": chance.uniform(0.4, 2.0),
                "learning_rate": dict.fromkeys(("vision", "connector", "language"), rate),
                "tokens": 16 * 118,
                "padded_tokens": 16 * 120,
                "trained_tokens": 16 * 47,
                "seconds": chance.gauss(0.46, 0.02) + (0.8 if step == 1 else 0.0),
                "wait_seconds": abs(chance.gauss(0.05, 0.015)),
                "peak_bytes": None,
                "reserved_bytes": None,
                "rss_bytes": int((690 + 60 * (1 - math.exp(-step / 20))) * MIB),
            }
        )
        if step % (steps // 5 or 1) == 0:
            rows.append({"event": "eval", "time": 1.76e9, "step": step, "loss": 1.9 * math.exp(-5.2 * done) + 0.075})
            rows.append({"event": "save", "time": 1.76e9, "step": step, "folder": f"checkpoints/checkpoint-{step}"})
    end = {"event": "end", "time": 1.76e9 + 220, "step": steps, "seconds": 198.4, "median_step_seconds": 0.51}
    return [*rows, end]


def answers(folder: Path, count: int, accuracy: float, seed: str) -> list[Document]:
    """Pages of four fields; each digit is read rightly with the given probability, a few answers are damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    found = []
    for place in range(count):
        truth = values(place)
        path = folder / f"{place:05d}.png"
        if not path.exists():
            draw(truth, place).save(path)
        wrong = {key: misread(value, accuracy, chance) for key, value in truth.items()}
        text = json.dumps(wrong)
        if chance.random() < 0.02 * (accuracy < 0.99):
            text = text[: chance.randrange(8, 60)]
        elif chance.random() < 0.05 * (accuracy < 0.8):
            text = "The page shows an order."
        found.append(
            Document(
                id=f"{place:05d}",
                truth=json.dumps(truth),
                predicted=text,
                image=str(path),
                tokens=71,
                new_tokens=47,
                finished=text.endswith("}"),
                seconds=0.021,
                width=168,
                height=168,
                crops=1,
            )
        )
    return found


def values(place: int) -> dict[str, Any]:
    chance = random.Random(place)
    return {
        "number": f"{chance.randrange(10_000):04d}",
        "quantity": chance.randrange(1, 100),
        "date": f"{chance.randrange(1, 29):02d}-{chance.randrange(1, 13):02d}",
        "total": f"{chance.randrange(1, 100)}.{chance.randrange(100):02d}",
    }


def misread(value: Any, accuracy: float, chance: random.Random) -> Any:
    text = "".join(
        chance.choice("0123456789") if sign.isdigit() and chance.random() > accuracy else sign for sign in str(value)
    )
    if chance.random() > 0.5 + accuracy / 2:
        text = text[:-1] or "1"
    return int(text) if isinstance(value, int) else text


def draw(truth: dict[str, Any], place: int) -> Image.Image:
    chance = random.Random(place)
    image = Image.new("L", (168, 168), 238)
    pen = ImageDraw.Draw(image)
    pen.text((10, 8), "ORDER", fill=50, font=ImageFont.load_default(13))
    pen.line((10, 26, 158, 26), fill=90)
    for row, (name, value) in enumerate(truth.items()):
        base = 61 + row * 34
        pen.text((10, base - 1), name[:5], fill=60, font=ImageFont.load_default(13), anchor="ls")
        pen.line((52, base, 158, base), fill=150)
        for index, sign in enumerate(str(value)):
            at = (60 + 15 * index + chance.randrange(-1, 2), base - 2 + chance.randrange(-2, 2))
            pen.text(at, sign, fill=30, font=ImageFont.load_default(22), anchor="ls")
    return image.rotate(chance.uniform(-2, 2), Image.Resampling.BILINEAR, fillcolor=238)


if __name__ == "__main__":
    make_run(Path(sys.argv[1]))
