"""What a scan of the user's data found: figures of every sample, and what follows from them for any batch or budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from memfit.specs.check import Broken, Distribution, Shortened
from memfit.specs.trace import Row
from memfit.specs.workload import ImageCost, SampleCost, Workload, heaviest

# Figures of a sample that are counted, in the order of the report: those of its cost, then pixels and bytes of its
# pictures' files.
COSTS = ("tokens", "trained_tokens", "image_tokens", "crops", "patches")
FIGURES = (*COSTS, "pixels", "bytes")
# What can be the worst in a batch: tokens decide the language model's phases, patches the vision tower's.
By = Literal["tokens", "patches"]


@dataclass(frozen=True)
class HeavySample:
    """One sample by name: its row in the file, what it takes, and its pictures' costs and upright sizes."""

    row: int
    id: str
    cost: SampleCost
    images: tuple[ImageCost, ...]
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cut:
    """What a budget takes away. Shares are of the scan's samples and tokens that it is compared with.

    `samples` are dropped or changed (too long, or pictures made smaller); `tokens` are lost with them.
    """

    budget: str
    samples: int
    sample_share: float
    tokens: int
    token_share: float
    image_token_share: float


@dataclass(frozen=True)
class WorkloadScan:
    """Every usable row of one data file, as arrays over samples.

    `figures`: one int64 array [samples] for each of FIGURES. `rows`, `ids`: where each sample stands. `pictures[k]` are
    the costs and upright sizes of the pictures of all samples i with `kinds[i]` = k. `max_length`: the recipe's limit
    (None for none): samples above it stand in the arrays as they are used, without the turns that `shortened` counts;
    those that cannot be shortened stand there whole, and are out of every batch and of `distributions`. `reading`:
    bytes that the largest picture takes while it is read (`memfit.physics.loader.reading_bytes`).
    """

    path: str
    images: int
    figures: Mapping[str, NDArray[np.int64]] = field(repr=False, compare=False)
    rows: NDArray[np.int64] = field(repr=False, compare=False)
    ids: tuple[str, ...] = field(repr=False)
    kinds: NDArray[np.int64] = field(repr=False, compare=False)
    pictures: tuple[tuple[tuple[ImageCost, ...], tuple[tuple[int, int], ...]], ...] = field(repr=False)
    distributions: tuple[Distribution, ...]
    broken: tuple[Broken, ...] = ()
    max_length: int | None = None
    shortened: tuple[Shortened, ...] = ()
    reading: int = 0

    @property
    def samples(self) -> int:
        """Usable samples within the length limit."""
        return int(self.inside().sum())

    def inside(self, max_length: int | None = None) -> NDArray[np.bool_]:
        """bool [samples]: within `max_length`, the scan's own limit where None is given."""
        limit = self.max_length if max_length is None else max_length
        tokens = self.figures["tokens"]
        return np.ones(len(tokens), dtype=bool) if limit is None else tokens <= limit

    def cost(self, index: int) -> SampleCost:
        """What sample number `index` of the arrays takes."""
        return SampleCost(**{name: int(self.figures[name][index]) for name in COSTS})

    def sample(self, index: int) -> HeavySample:
        """Sample number `index` of the arrays, by name."""
        images, sizes = self.pictures[int(self.kinds[index])]
        return HeavySample(int(self.rows[index]), self.ids[index], self.cost(index), images, sizes)

    def worst_batch(
        self, micro_batch: int, by: By = "tokens", max_length: int | None = None
    ) -> tuple[HeavySample, ...]:
        """The batch of `micro_batch` samples with the most `by` that a random sampler can draw, the heaviest first.

        Rows that are padded to the longest and rows that are packed end to end have the same worst batch. Among equals
        the other figure decides. Fewer samples where there are fewer.
        """
        return tuple(map(self.sample, self._heaviest_first(by, max_length)[:micro_batch]))

    def _heaviest_first(self, by: By, max_length: int | None) -> list[int]:
        usable = np.flatnonzero(self.inside(max_length))
        other = "patches" if by == "tokens" else "tokens"
        order = np.lexsort((self.rows[usable], -self.figures[other][usable], -self.figures[by][usable]))
        return [int(place) for place in usable[order]]

    def batch_rows(self, micro_batch: int, max_length: int | None = None, packing: bool = False) -> tuple[Row, ...]:
        """The worst batch by tokens as a trace takes it: it has padding where it can (`heaviest`)."""
        order = self._heaviest_first("tokens", max_length)
        places = heaviest([int(self.figures["tokens"][index]) for index in order], micro_batch, packing)
        batch = [self.sample(order[place]) for place in places]
        return tuple(Row(sample.cost.tokens, sample.images, sample.cost.trained_tokens) for sample in batch)

    def worst_batches(self, micro_batch: int, max_length: int | None = None) -> dict[By, tuple[HeavySample, ...]]:
        """The worst batch by tokens, and by patches where that is another one: each decides the peak of some phase."""
        by_tokens = self.worst_batch(micro_batch, "tokens", max_length)
        by_patches = self.worst_batch(micro_batch, "patches", max_length)
        most = sum(sample.cost.patches for sample in by_tokens)
        found: dict[By, tuple[HeavySample, ...]] = {"tokens": by_tokens}
        if sum(sample.cost.patches for sample in by_patches) > most:
            found["patches"] = by_patches
        return found

    def workload(self, max_length: int | None = None) -> Workload:
        """The worst sample and the mean, as forecasts take them. ValueError when no sample is within the limit."""
        inside = self.inside(max_length)
        if not inside.any():
            raise ValueError(f"no sample has at most {max_length or self.max_length} tokens")
        means = {name: round(float(self.figures[name][inside].mean())) for name in COSTS}
        worst = self.worst_batch(1, "tokens", max_length)[0]
        return Workload(worst.cost, SampleCost(**means), int(inside.sum()), "data")

    def cut_by_length(self, max_length: int) -> Cut:
        """The most that `max_length` can take: all of every longer sample, as where each is one question and answer.

        Training leaves out whole turns where that is enough (`memfit.inputs.data.workload.cut_by_length` counts it).
        """
        tokens, images = self.figures["tokens"], self.figures["image_tokens"]
        out = tokens > max_length
        return Cut(
            budget=f"max_length: {max_length}",
            samples=int(out.sum()),
            sample_share=_share(out.sum(), len(tokens)),
            tokens=int(tokens[out].sum()),
            token_share=_share(tokens[out].sum(), tokens.sum()),
            image_token_share=_share(images[out].sum(), images.sum()),
        )

    def cut_to(self, smaller: WorkloadScan, budget: str) -> Cut:
        """What another budget takes away: `smaller` is the scan of the same data under it."""
        left = smaller.inside()
        mine = {int(row): index for index, row in enumerate(self.rows)}
        pairs = [(mine[int(row)], index) for index, row in enumerate(smaller.rows) if int(row) in mine]
        before = np.array([one for one, _ in pairs], dtype=np.int64)
        after = np.array([other for _, other in pairs], dtype=np.int64)
        kept = left[after] if len(pairs) else np.zeros(0, dtype=bool)
        lost = self.figures["tokens"][before] - smaller.figures["tokens"][after] * kept
        images = self.figures["image_tokens"][before] - smaller.figures["image_tokens"][after] * kept
        return Cut(
            budget=budget,
            samples=int((lost != 0).sum()),
            sample_share=_share((lost != 0).sum(), len(self.rows)),
            tokens=int(lost.sum()),
            token_share=_share(lost.sum(), self.figures["tokens"].sum()),
            image_token_share=_share(images.sum(), self.figures["image_tokens"].sum()),
        )

    def to_json(self, heaviest: int = 3) -> dict[str, Any]:
        """Plain JSON values: counts, histograms, the heaviest samples by tokens and patches; no arrays."""
        return {
            "path": self.path,
            "samples": self.samples,
            "images": self.images,
            "broken": len(self.broken),
            "max_length": self.max_length,
            "shortened": len(self.shortened),
            "distributions": [asdict(one) for one in self.distributions],
            "heaviest": {
                by: [
                    {"row": one.row, "id": one.id, **asdict(one.cost), "sizes": [list(size) for size in one.sizes]}
                    for one in samples
                ]
                for by, samples in self.worst_batches(heaviest).items()
            },
        }


def _share(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else 0.0
