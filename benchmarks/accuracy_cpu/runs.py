"""From a cell to what memfit is given: the recipe, the samples and the model folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.accuracy_cpu.grid import Cell
from benchmarks.accuracy_cpu.models import make_model
from memfit.inputs.data.images import read_size
from memfit.inputs.encode import NO_LOSS, Encoder
from memfit.inputs.recipe_file import load_recipe
from memfit.specs.recipe import Recipe
from memfit.specs.sample import Sample, Turn
from memfit.specs.trace import Row
from memfit.trace.prepare import Prepared, prepare

DIGITS = "0123456789"


def recipe_of(cell: Cell, work: Path) -> Recipe:
    """The recipe of a cell on the model in `work`. Raises UserError for a lever that the recipe does not know."""
    lora = cell.method != "full"
    levers: dict[str, Any] = {
        "precision": cell.precision,
        "optimizer": "adamw",
        "checkpointing": _checkpointing(cell.checkpointing),
        "loss": cell.loss,
        "attention": cell.attention,
        "parallel": cell.parallel,
        "offload": cell.offload,
        "pin_memory": False,
        "micro_batch": len(cell.rows),
        "packing": cell.batching == "packed",
    }
    values: dict[str, Any] = {
        "model": str(make_model(cell.kind, work / cell.kind)),
        "method": "lora" if lora else "full",
        "parts": dict(item.split("=") for item in cell.parts.split(",") if item),
        "levers": levers,
        "batch": len(cell.rows) * cell.ranks,
        "hardware": {"gpus": f"{cell.ranks}xcpu"},
        "image": {"max_slices": cell.max_slices if cell.max_slices == "auto" else int(cell.max_slices)},
    }
    if lora:
        values["lora"] = {
            "rank": cell.lora_rank,
            "alpha": cell.lora_rank,
            "dropout": cell.lora_dropout,
            "dtype": cell.lora_dtype,
            "targets": cell.lora_targets,
            "variant": "dora" if cell.method == "dora" else "lora",
        }
    if cell.reduce_bucket:
        values["engine"] = {"zero": {"reduce_bucket_size": cell.reduce_bucket}}
    file = work / f"{cell.id}-{os.getpid()}.yaml"  # ranks write their own
    file.write_text(json.dumps(values), encoding="utf-8")
    recipe = load_recipe(file)
    file.unlink()
    return recipe


def _checkpointing(text: str) -> str | dict[str, str]:
    part, equals, mode = text.partition("=")
    if not equals:
        return text
    return {name: mode if name == part else "none" for name in ("vision", "connector", "language")}


def prepared_of(cell: Cell, work: Path) -> Prepared:
    """The prepared recipe of a cell."""
    return prepare(recipe_of(cell, work))


def samples_of(cell: Cell, work: Path) -> tuple[Sample, ...]:
    """One sample for each row: its pictures, a short question, an answer of digits."""
    return tuple(_sample(number, digits, pictures, work) for number, (digits, pictures) in enumerate(cell.rows))


def _sample(number: int, digits: int, pictures: tuple[tuple[int, int], ...], work: Path) -> Sample:
    answer = (DIGITS * (digits // 10 + 1))[:digits]
    paths = tuple(_picture(size, work) for size in pictures)
    turns = (Turn("user", (*range(len(paths)), "Read.")), Turn("assistant", (answer,)))
    return Sample(id=str(number), row=number, turns=turns, images=paths)


def _picture(size: tuple[int, int], work: Path) -> Path:
    from PIL import Image

    path = work / f"{size[0]}x{size[1]}.png"
    if not path.exists():
        Image.effect_noise(size, 60).convert("RGB").save(path)
    return path


def rows_of(prepared: Prepared, samples: tuple[Sample, ...]) -> tuple[Row, ...]:
    """The rows as the forecast takes them, in the batch's order."""
    encoder = Encoder(prepared.source, prepared.recipe.image)
    encoded = [encoder.encode(sample, [read_size(path) for path in sample.images]) for sample in samples]
    return tuple(Row(len(row.input_ids), row.image_costs, int((row.labels != NO_LOSS).sum())) for row in encoded)
