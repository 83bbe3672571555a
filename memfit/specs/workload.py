"""The workload: what one sample costs in the model's own units, and which sample is the worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ImageCost:
    """One picture after the processor: `crops` are (rows, columns) in vision patches, the overview first.

    `tokens` are the places it takes in the language model's sequence, without marker tokens; `crop_tokens` the same
    per crop.
    `grid` is (rows, columns) of slices beside the overview, (0, 0) when there are none.
    """

    crops: tuple[tuple[int, int], ...]
    crop_tokens: tuple[int, ...]
    grid: tuple[int, int] = (0, 0)

    @property
    def patches(self) -> int:
        return sum(rows * columns for rows, columns in self.crops)

    @property
    def tokens(self) -> int:
        return sum(self.crop_tokens)


@dataclass(frozen=True)
class SampleCost:
    """One sample: `tokens` is the whole sequence including image tokens, `trained_tokens` those that carry loss."""

    tokens: int
    trained_tokens: int
    image_tokens: int
    crops: int
    patches: int


@dataclass(frozen=True)
class LoaderLoad:
    """Bytes that decide a data loader's host memory, each the most over all samples.

    `reading`: one picture while it is read and prepared. `sample`: the tensors of one sample. `batch`: those of one
    micro-batch.
    """

    reading: int
    sample: int
    batch: int


@dataclass(frozen=True)
class Workload:
    """The worst batch decides the peak; the means decide the time.

    `source` is "data", "recipe" (workload keys) or "default"; `samples` is None when no data was read.
    """

    worst: SampleCost
    mean: SampleCost | None
    samples: int | None
    source: str


def heaviest(tokens: Sequence[int], micro_batch: int, packing: bool = False) -> list[int]:
    """Places of the rows of the heaviest micro-batch in `tokens`, which fall from the longest.

    The longest, except that a batch of equal lengths needs no mask, and one with a single shorter row does: padded it
    is as long. Packed rows are never padded.
    """
    places = list(range(min(micro_batch, len(tokens))))
    shorter = next((place for place, length in enumerate(tokens) if length < tokens[0]), None)
    if len(places) > 1 and not packing and shorter is not None and shorter > places[-1]:
        places[-1] = shorter
    return places
