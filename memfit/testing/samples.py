"""A tiny data set in the OpenBMB format: coloured squares to count."""

from __future__ import annotations

import json
import random
from pathlib import Path

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200), "black": (20, 20, 20)}


def make_samples(folder: Path, count: int, seed: int = 0) -> Path:
    """Write `count` PNG pictures under folder/images and folder/data.json beside them; returns data.json's path.

    Pictures are 60 to 240 px a side and show one to five squares of one colour; the answer is JSON. The same seed
    gives the same files.
    """
    from PIL import Image, ImageDraw

    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        width, height = rng.randint(60, 240), rng.randint(60, 240)
        colour, squares = rng.choice(sorted(COLOURS)), rng.randint(1, 5)
        picture = Image.new("RGB", (width, height), (255, 255, 255))
        draw = ImageDraw.Draw(picture)
        side = min(width, height) // 6
        for place in rng.sample(range(9), squares):
            x, y = (place % 3) * width // 3, (place // 3) * height // 3
            draw.rectangle((x, y, x + side, y + side), fill=COLOURS[colour])
        picture.save(folder / "images" / f"{index:05d}.png")
        answer = json.dumps({"colour": colour, "squares": squares})
        rows.append(
            {
                "id": f"{index:05d}",
                "image": f"images/{index:05d}.png",
                "conversations": [
                    {"role": "user", "content": "<image>\nWhich colour, and how many squares? Answer in JSON."},
                    {"role": "assistant", "content": answer},
                ],
            }
        )
    path = folder / "data.json"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path
