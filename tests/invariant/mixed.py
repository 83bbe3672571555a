"""Samples as unlike as they come: without a picture, with one of one crop, with one of many."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from memfit.testing import make_samples


def make_mixed(folder: Path, count: int) -> Path:
    """`make_samples`, then of every three rows one without its picture and one with a picture of many crops."""
    path = make_samples(folder, count)
    rows = json.loads(path.read_text())
    for index, row in enumerate(rows):
        file = folder / row["image"]
        if index % 3 == 0:
            del row["image"]
            row["conversations"][0]["content"] = f"Without a picture, what is the colour of number {index}?"
            file.unlink()
        elif index % 3 == 1:
            Image.open(file).resize((300, 240 + 8 * index)).save(file)
    path.write_text(json.dumps(rows))
    return path
