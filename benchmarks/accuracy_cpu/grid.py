"""Two grids of 60 cells each, drawn by a seeded sampler.

    python -m benchmarks.accuracy_cpu.grid            # draw, check, write grid.json and grid_second.json

The first was written before anything was predicted, and much was mended by it since. The second, of another seed, was
drawn when the first was within its limits, to see what the mending was worth on cells that nobody had looked at.

Each factor is a shuffled deck of its levels, so that every level comes as often as its weight says. Only what upstream
itself cannot run is kept out (autocast under ZeRO, FSDP2's offload of the optimizer alone, QLoRA on a CPU, a parameter
without a gradient under DDP). What memfit cannot forecast or build stays in the grid and counts as refused.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy_cpu.models import WITH_IMAGES

CELLS = 60
# (levers.parallel, levers.offload): engines on two ranks, twice each; the rest runs on one.
LAYOUTS = [
    *[("zero1", "none"), ("zero1", "optimizer"), ("zero2", "none"), ("zero2", "optimizer"), ("zero3", "none")] * 2,
    *[("zero3", "optimizer"), ("zero3", "params+optimizer"), ("fsdp", "none"), ("fsdp", "params+optimizer")] * 2,
    *[("ddp", "none")] * 2,
]
KINDS = {"minicpmv4_6": 14, "qwen2_5_vl": 14, "llava": 12, "llama": 10, "qwen3": 10}
METHODS = {"full": 3, "lora": 3, "dora": 2}
# What learns beside the method's own, by (method is full, the model sees pictures); "": the method's default.
PARTS: dict[tuple[bool, bool], dict[str, int]] = {
    (True, True): {"": 3, "vision=frozen": 3, "vision=last-2": 2, "language=last-2": 2, "language=frozen": 1},
    (True, False): {"": 2, "language=last-2": 1},
    (False, True): {"": 3, "vision=full": 2, "vision=last-2": 2},
    (False, False): {"": 1},
}
# By whether the model sees pictures: one mode for all parts, or for one alone.
CHECKPOINTING: dict[bool, dict[str, int]] = {
    True: {"none": 3, "full": 3, "every-2": 2, "selective": 2, "vision=full": 1, "language=full": 1},
    False: {"none": 2, "full": 2, "every-2": 1, "selective": 1},
}
LOSSES = {"full-logits": 2, "chunked": 1}
# By engine: what it runs (upstream has no autocast under ZeRO).
PRECISIONS: dict[str, dict[str, int]] = {
    "none": {"fp32": 1, "bf16-amp": 1, "pure-bf16": 1},
    "ddp": {"fp32": 1, "bf16-amp": 1, "pure-bf16": 1},
    "zero": {"bf16-mixed": 3, "fp32": 2, "pure-bf16": 1},
    "fsdp": {"bf16-mixed": 1, "bf16-amp": 1, "fp32": 1, "pure-bf16": 1},
}
ATTENTION = {"sdpa": 2, "eager": 1}
BATCHING = {"one": 3, "equal": 2, "padded": 3, "packed": 1}
# Digits in the answer, one token each; eager attention keeps the square of the length.
LENGTHS: dict[str, dict[int, int]] = {"sdpa": {384: 1, 512: 1, 768: 1}, "eager": {256: 1, 384: 1}}
PICTURES = {"224x224": 1, "448x448": 2, "672x448": 2, "300x900": 1, "2 of 448x448": 1}
SLICES = {"auto": 2, "1": 1, "2": 1}  # image.max_slices, for models that slice
RANKS = {8: 1, 32: 1}
DROPOUTS = {0.0: 2, 0.05: 1}
ADAPTER_DTYPES = {"fp32": 2, "bf16": 1}
TARGETS = {"auto": 2, "all-linear": 1}
BUCKETS = {0: 1, 3_000_000: 1}  # zero.reduce_bucket_size in elements; 0: what memfit sets by itself


@dataclass(frozen=True)
class Grid:
    """One draw: its `file` beside this one, and the letter that its cells' names begin with."""

    title: str
    seed: int
    letter: str
    file: str


GRIDS = (
    Grid("First grid", 20261121, "c", "grid.json"),
    Grid("Second grid", 20261122, "d", "grid_second.json"),
)


@dataclass(frozen=True)
class Cell:
    """One run. `rows`: digits of the answer and pictures (width, height) of every row of the micro-batch."""

    id: str
    kind: str
    parallel: str
    offload: str
    ranks: int
    method: str
    parts: str
    checkpointing: str
    loss: str
    precision: str
    attention: str
    batching: str
    rows: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
    max_slices: str
    lora_rank: int
    lora_dropout: float
    lora_dtype: str
    lora_targets: str
    reduce_bucket: int

    @property
    def has_images(self) -> bool:
        return any(pictures for _, pictures in self.rows)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Cell:
        """Inverse of `dataclasses.asdict` through JSON."""
        rows = tuple((digits, tuple((w, h) for w, h in pictures)) for digits, pictures in data["rows"])
        return Cell(**data | {"rows": rows})


class _Decks:
    """One deck for every factor and context: every level stands in it as often as its weight says."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._cards: dict[str, list[Any]] = {}

    def draw(self, name: str, weights: Mapping[Any, int]) -> Any:
        """The next card of the deck `name`, which is filled and shuffled when it is empty."""
        cards = self._cards.setdefault(name, [])
        if not cards:
            cards += [card for card, count in weights.items() for _ in range(count)]
            self._rng.shuffle(cards)
        return cards.pop()


def draw_grid(seed: int, letter: str = "c", cells: int = CELLS) -> tuple[Cell, ...]:
    """The cells of a seed, always the same."""
    rng = random.Random(seed)
    layouts = [*LAYOUTS, *[("none", "none")] * (cells - len(LAYOUTS))]
    rng.shuffle(layouts)
    decks = _Decks(rng)
    return tuple(_cell(f"{letter}{number:02d}", layout, decks) for number, layout in enumerate(layouts))


def _cell(name: str, layout: tuple[str, str], decks: _Decks) -> Cell:
    parallel, offload = layout
    kind, method = decks.draw("kind", KINDS), decks.draw("method", METHODS)
    seen, full = kind in WITH_IMAGES, method == "full"
    attention, batching = decks.draw("attention", ATTENTION), decks.draw("batching", BATCHING)
    engine = "zero" if parallel.startswith("zero") else parallel
    parts = decks.draw(f"parts {full} {seen}", PARTS[full, seen])
    if parallel == "ddp" and kind == "llava" and (full or parts):
        # torch refuses a parameter without a gradient under DDP, and the last block of LLaVA's tower gets none.
        parts = "vision=frozen"
    return Cell(
        id=name,
        kind=kind,
        parallel=parallel,
        offload=offload,
        ranks=1 if parallel == "none" else 2,
        method=method,
        parts=parts,
        checkpointing=decks.draw(f"checkpointing {seen}", CHECKPOINTING[seen]),
        loss=decks.draw("loss", LOSSES),
        precision=decks.draw(f"precision {engine}", PRECISIONS[engine]),
        attention=attention,
        batching=batching,
        rows=_rows(batching, attention, seen, decks),
        max_slices=decks.draw("slices", SLICES) if kind == "minicpmv4_6" else "auto",
        lora_rank=0 if full else decks.draw("rank", RANKS),
        lora_dropout=0.0 if full else decks.draw("dropout", DROPOUTS),
        lora_dtype="fp32" if full else decks.draw("dtype", ADAPTER_DTYPES),
        lora_targets="auto" if full else decks.draw("targets", TARGETS),
        reduce_bucket=decks.draw("bucket", BUCKETS) if engine == "zero" else 0,
    )


def _rows(batching: str, attention: str, seen: bool, decks: _Decks) -> tuple[Any, ...]:
    """One row, two alike, two of which one is padded, or three that are packed."""
    first = decks.draw(f"length {attention}", LENGTHS[attention])
    pictures = _pictures(decks.draw("pictures", PICTURES)) if seen else ()
    if batching == "one":
        return ((first, pictures),)
    if batching == "equal":
        return ((first, pictures),) * 2
    rest = 1 if batching == "padded" else 2
    return ((first, pictures), *((first // 2, pictures[:1]),) * rest)


def _pictures(card: str) -> tuple[tuple[int, int], ...]:
    count, _, size = card.rpartition(" of ")
    width, height = map(int, size.split("x"))
    return ((width, height),) * int(count or 1)


def check(cells: Sequence[Cell]) -> None:
    """What the grid must hold. AssertionError where it does not."""
    assert len(cells) == CELLS
    assert len({cell.kind for cell in cells}) >= 4
    assert sum(cell.has_images for cell in cells) >= 30
    assert sum(cell.ranks == 2 and cell.parallel != "ddp" for cell in cells) >= 12
    for field in ("method", "checkpointing", "loss", "precision", "attention", "batching"):
        assert min(Counter(getattr(cell, field) for cell in cells).values()) >= 2, field


def read_grid(grid: Grid) -> tuple[Cell, ...]:
    """The committed cells of one grid."""
    text = (Path(__file__).parent / grid.file).read_text(encoding="utf-8")
    return tuple(Cell.from_json(row) for row in json.loads(text)["cells"])


def read_cells() -> dict[str, Cell]:
    """The committed cells of all grids, by name."""
    return {cell.id: cell for grid in GRIDS for cell in read_grid(grid)}


def main() -> None:
    """Draw and write the grids."""
    for grid in GRIDS:
        cells = draw_grid(grid.seed, grid.letter)
        check(cells)
        rows = ",\n  ".join(json.dumps(asdict(cell)) for cell in cells)
        text = f'{{"seed": {grid.seed}, "cells": [\n  {rows}\n]}}\n'
        (Path(__file__).parent / grid.file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
