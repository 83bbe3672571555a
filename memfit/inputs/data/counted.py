"""What a workload scan counts, sample by sample, and its cache: a second scan of data that have not changed.

A kept count is taken when the data file, every picture, the tokenizer, the recipe's view of them and memfit's own code
are as they were, by size and times of change. It is a cache: whatever fails here costs time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memfit.inputs.cache import cache_folder, write_cached
from memfit.inputs.data.headers import ImageHeader
from memfit.inputs.data.known import stamp
from memfit.physics.loader import reading_bytes
from memfit.specs.check import Broken, Shortened
from memfit.specs.recipe import Recipe
from memfit.specs.sample import Sample
from memfit.specs.workload import ImageCost
from memfit.specs.workload_scan import COSTS, FIGURES

# Raised when a count changes its meaning.
FORMAT = 2
MOST_KEPT = 500_000  # samples of one count; about 100 bytes each
# Code that decides what a sample takes.
_CODE = ("families/*.py", "inputs/*.py", "inputs/data/*.py")
_PACKAGE = Path(__file__).parents[2]

Pictures = tuple[tuple[ImageCost, ...], tuple[tuple[int, int], ...]]


@dataclass
class Counted:
    """Figures of every usable row, in the file's order; see `memfit.specs.workload_scan.WorkloadScan`."""

    figures: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in FIGURES})
    rows: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    pictures: dict[Pictures, int] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    images: int = 0
    shortened: list[Shortened] = field(default_factory=list)
    reading: int = 0

    def add(self, sample: Sample, encoded: Any, cost: Any, headers: Sequence[ImageHeader]) -> None:
        """Count one sample. `headers` are those of `sample.images`, `encoded` and `cost` the encoder's."""
        for path, header in zip(sample.images, headers, strict=True):
            self.reading = max(self.reading, reading_bytes(header.width, header.height, path.suffix))
        for name in COSTS:
            self.figures[name].append(getattr(cost, name))
        self.figures["pixels"].append(sum(header.width * header.height for header in headers))
        self.figures["bytes"].append(sum(header.bytes for header in headers))
        self.rows.append(sample.row)
        self.ids.append(sample.id)
        sizes = tuple((headers[place].width, headers[place].height) for place in encoded.image_order)
        key = (tuple(encoded.image_costs), sizes)
        self.kinds.append(self.pictures.setdefault(key, len(self.pictures)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        pictures = [[[asdict(cost) for cost in costs], sizes] for costs, sizes in self.pictures]
        rows = {"broken": [asdict(row) for row in self.broken], "shortened": [asdict(row) for row in self.shortened]}
        return vars(self) | {"pictures": pictures} | rows

    @staticmethod
    def from_json(data: dict[str, Any]) -> Counted:
        """The inverse of `to_json`. KeyError, TypeError or ValueError for anything else."""
        pictures = {
            (tuple(_cost(**cost) for cost in costs), tuple((width, height) for width, height in sizes)): number
            for number, (costs, sizes) in enumerate(data["pictures"])
        }
        broken = [Broken(**row) for row in data["broken"]]
        cut = [Shortened(**row) for row in data["shortened"]]
        return Counted(**data | {"pictures": pictures, "broken": broken, "shortened": cut})


def _cost(crops: list[list[int]], crop_tokens: list[int], grid: list[int]) -> ImageCost:
    rows, columns = grid
    return ImageCost(tuple((one, other) for one, other in crops), tuple(crop_tokens), (rows, columns))


def count_key(recipe: Recipe, data: Path, encoder: Any) -> str | None:
    """The key of a count; None where it cannot be told whether things have changed (no model folder, a fresh file)."""
    source = getattr(encoder, "source", None)
    folder = getattr(source, "folder", None)
    if folder is None:
        return None
    files = [data, *sorted(path for path in Path(folder).iterdir() if path.suffix in {".json", ".jinja"})]
    code = sorted(path for pattern in _CODE for path in _PACKAGE.glob(pattern))
    stamps = [(str(path.absolute()), stamp(path)) for path in (*files, *code)]
    if any(mark is None for _, mark in stamps):
        return None
    view = (asdict(recipe.data), asdict(recipe.image), recipe.model_config, recipe.seed, recipe.max_length)
    text = json.dumps([FORMAT, stamps, view], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load_count(key: str) -> Counted | None:
    """The kept count if every picture is as it was, else None."""
    try:
        kept = json.loads(_file(key).read_text(encoding="utf-8"))
        if _digest(map(Path, kept["paths"])) != kept["digest"]:
            return None
        return Counted.from_json(kept["counted"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store_count(key: str, counted: Counted, paths: Iterable[Path]) -> None:
    """Keep a count with the pictures that it rests on, unless one of them was written only just now."""
    names = [str(path) for path in paths]
    digest = _digest(map(Path, names))
    if digest is not None and len(counted.rows) <= MOST_KEPT:
        write_cached(_file(key), {"paths": names, "digest": digest, "counted": counted.to_json()})


def _file(key: str) -> Path:
    return cache_folder() / "workloads" / f"{key}.json"


def _digest(paths: Iterable[Path]) -> str | None:
    """A hash of the stamps of pictures, missing ones included; None when one may still change."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        mark = stamp(path)
        if mark is None and path.exists():
            return None
        digest.update(f"{path}:{mark}\n".encode())
    return digest.hexdigest()
