"""Several ranks see the samples that one would: the same order, filled up to whole batches by samples without loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Dataset, Sampler

from memfit.build.data import IGNORED, SampleDataset


class FilledDataset(Dataset):
    """`samples`, and behind them each sample once more without a label, so that it adds nothing to loss or gradient.

    Its length is that of the real samples.
    """

    def __init__(self, samples: SampleDataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index < len(self.samples):
            return self.samples[index]
        row = dict(self.samples[index - len(self.samples)])
        row["labels"] = torch.full_like(row["labels"], IGNORED)
        return row


class FilledSampler(Sampler[int]):
    """The order that accelerate gives one process, then fillers up to a multiple of `unit` samples.

    accelerate would repeat samples instead, which then count twice (accelerate.data_loader:BatchSamplerShard).
    """

    def __init__(self, dataset: FilledDataset, unit: int, seed: int) -> None:
        self._order = SeedableRandomSampler(dataset, data_seed=seed)
        self._samples = len(dataset)
        self._unit = unit

    def __len__(self) -> int:
        return -(-self._samples // self._unit) * self._unit

    def __iter__(self) -> Iterator[int]:
        order = list(self._order)
        yield from order
        for place in range(len(self) - self._samples):
            yield self._samples + order[place % self._samples]

    def set_epoch(self, epoch: int) -> None:
        """The order of this epoch; accelerate calls it."""
        self._order.set_epoch(epoch)
