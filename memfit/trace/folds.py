"""Which blocks of a part run and which of them stand for the others: blocks of one kind between like neighbours.

What a block makes depends on what it is; what is freed while it runs, also on the blocks before and behind it, whose
results it takes over and whose gradients it gets. So of all blocks with the same three (the one before, itself, the
one behind) one has to run. Those that run are chosen so that each has beside it what it has in the whole model. Needs
no torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

LARGEST = 12  # different surroundings in one part that a choice is looked for among


@dataclass(frozen=True)
class Fold:
    """The blocks of one part. `kinds`: for each block a number, equal for equal blocks. `stands`: for each block the
    one that runs in its place; a block that runs stands for itself."""

    part: str
    kinds: tuple[int, ...]
    stands: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """The blocks that run, in order."""
        return tuple(sorted(set(self.stands)))

    @property
    def skipped(self) -> tuple[int, ...]:
        """The blocks that do not run."""
        return tuple(block for block, other in enumerate(self.stands) if block != other)

    def count(self, block: int) -> int:
        """How many blocks this one stands for, itself included; 1 for blocks that are not of this fold."""
        return max(1, self.stands.count(block))


def fold_of(part: str, blocks: Sequence[Hashable]) -> Fold | None:
    """The fold that runs the fewest blocks; None where all have to run. Equal blocks have equal values."""
    numbers: dict[Hashable, int] = {}
    kinds = tuple(numbers.setdefault(block, len(numbers)) for block in blocks)
    around = [tuple(place) for place in zip((-1, *kinds), kinds, (*kinds[1:], -1), strict=False)]
    kept = _fewest(kinds, [sorted(set(around)).index(place) for place in around])
    if len(kept) == len(kinds):
        return None
    first = {around[block]: block for block in reversed(kept)}
    ran = set(kept)
    return Fold(part, kinds, tuple(at if at in ran else first[place] for at, place in enumerate(around)))


def _fewest(kinds: Sequence[int], around: Sequence[int]) -> tuple[int, ...]:
    """The shortest way from the first block to the last that meets every surrounding, the earliest blocks first."""
    count, whole = len(kinds), (1 << (max(around, default=0) + 1)) - 1
    if whole.bit_count() > LARGEST:
        return tuple(range(count))
    # block -> what was met on a way that ends there -> the shortest such way
    ways: list[dict[int, tuple[int, ...]]] = [{} for _ in kinds]
    if count:
        ways[0][1 << around[0]] = (0,)
    for here in range(count):
        for met, way in ways[here].items():
            for there in range(here + 1, count):
                # Neighbours on the way must be of the kinds that they have beside them in the model.
                if kinds[there] != kinds[here + 1] or kinds[there - 1] != kinds[here]:
                    continue
                now = met | 1 << around[there]
                if now not in ways[there] or len(way) + 1 < len(ways[there][now]):
                    ways[there][now] = (*way, there)
    return ways[-1].get(whole, tuple(range(count))) if count else ()
