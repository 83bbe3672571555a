"""How many pictures a second a workload scan looks at, from a cold cache, on a mix of JPEG, PNG and WebP.

    python benchmarks/scan_speed.py FOLDER [COUNT]

Writes COUNT pictures (6,000; 5 GB) of 300 to 1,800 px a side with EXIF orientations below FOLDER once, drops their
pages from the kernel's cache before every turn, and scans them with a tiny model's own encoder: headers alone, and the
whole scan with its tokens. memfit's own cache is empty in the first turn, knows the pictures' sizes in the second and
the whole scan in the third.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from memfit.inputs.data.headers import HeaderReader  # noqa: E402
from memfit.inputs.data.workload import scan_workload  # noqa: E402
from memfit.inputs.encode import Encoder  # noqa: E402
from memfit.inputs.model_source import find_model  # noqa: E402
from memfit.specs.recipe import Data, Recipe  # noqa: E402
from memfit.testing import make_dummy  # noqa: E402

KINDS = ("jpg", "png", "webp")
DISTINCT = 60  # pictures that are drawn; the others are copies under names of their own


def make_data(folder: Path, count: int) -> Path:
    """The pictures and an OpenBMB data file beside them."""
    data = folder / f"data-{count}.jsonl"
    if data.exists():
        return data
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (350, 450, 3), dtype=np.uint8)
    paper = Image.fromarray(noise).resize((1800, 1400))
    drawn = []
    for number in range(DISTINCT):
        exif = Image.Exif()
        exif[0x0112] = rng.choice((1, 3, 6, 8))
        path = folder / f"drawn-{number}.{KINDS[number % 3]}"
        paper.crop((0, 0, rng.randint(300, 1800), rng.randint(200, 1400))).save(path, exif=exif)
        drawn.append(path)
    rows = []
    for number in range(count):
        source = drawn[number % DISTINCT]
        target = folder / "images" / f"{number:06d}{source.suffix}"
        shutil.copyfile(source, target)
        words = "text " * rng.randint(1, 60)
        turns = [
            {"role": "user", "content": f"<image>\nRead the fields and answer as JSON, please, number {number}."},
            {"role": "assistant", "content": json.dumps({"number": number, "text": words})},
        ]
        rows.append({"id": str(number), "image": f"images/{target.name}", "conversations": turns})
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    os.sync()
    return data


def drop_pages(folder: Path) -> None:
    """Ask the kernel to forget the pictures' pages."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def main(folder: Path, count: int) -> None:
    """Print pictures a second."""
    data = make_data(folder, count)
    os.environ["MEMFIT_CACHE"] = str(folder / "cache")
    model = folder / "model"
    if not model.exists():
        make_dummy("minicpmv4_6", model)
    recipe = Recipe(model=str(model), data=Data(train=str(data)))
    encoder = Encoder(find_model(str(model)), recipe.image)
    pictures = sorted((folder / "images").iterdir())[:count]
    shutil.rmtree(folder / "cache", ignore_errors=True)
    drop_pages(folder / "images")
    reader = HeaderReader()
    start = time.perf_counter()
    reader.read(pictures)
    print(f"headers, cold: {count / (time.perf_counter() - start):,.0f} pictures a second")
    reader.close()
    shutil.rmtree(folder / "cache", ignore_errors=True)
    for what in ("cold", "known sizes", "nothing changed"):
        if what == "known sizes":
            shutil.rmtree(folder / "cache" / "workloads", ignore_errors=True)
        drop_pages(folder / "images")
        start, cpu = time.perf_counter(), time.process_time()
        scan = scan_workload(recipe, encoder)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        rate = f"{scan.samples / wall:,.0f} samples a second, {scan.samples / cpu:,.0f} a second of processor"
        print(f"whole scan, {what}: {rate}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 6000)
