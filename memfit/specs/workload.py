"""The workload: what one sample costs in the model's own units, and which sample is the worst."""

from __future__ import annotations

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
class Workload:
    """The worst batch decides the peak; the means decide the time.

    `source` is "data", "recipe" (workload keys) or "default"; `samples` is None when no data was read.
    """

    worst: SampleCost
    mean: SampleCost | None
    samples: int | None
    source: str
