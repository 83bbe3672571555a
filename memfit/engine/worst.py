"""The order in which a proof draws its samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler


class StepSampler(Sampler[int]):
    """One optimizer step an epoch: every rank gets the same `micros` micro-batches of one batch.

    accelerate hands batches out in turns (accelerate.data_loader:BatchSamplerShard), so each stands there once a rank.
    """

    def __init__(self, batches: Sequence[Sequence[int]], micros: int, ranks: int) -> None:
        self._batches, self._copies, self._epoch = batches, micros * ranks, 0

    def __len__(self) -> int:
        return len(self._batches[0]) * self._copies

    def __iter__(self) -> Iterator[int]:
        batch = self._batches[min(self._epoch, len(self._batches) - 1)]
        for _ in range(self._copies):
            yield from batch

    def set_epoch(self, epoch: int) -> None:
        """The step that comes next; accelerate calls it."""
        self._epoch = epoch
