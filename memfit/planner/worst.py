"""Which micro-batches of the user's own data may decide a peak: no single figure of a sample says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memfit.specs.workload import SampleCost, heaviest


@dataclass(frozen=True)
class Chosen:
    """One micro-batch: why, and the places of its samples in the training data, the heaviest first."""

    reason: str
    places: tuple[int, ...]


def worst_batches(costs: Sequence[SampleCost], micro: int, packing: bool = False) -> tuple[Chosen, ...]:
    """The micro-batches that may decide a phase: most tokens, most patches, the largest sum of both as shares of their
    largest.

    Tokens decide the language model's phases, patches the vision tower's. A batch of the same samples as an earlier one
    is left out. Where there are fewer samples than a micro-batch has, they are repeated. Empty without costs.
    """
    if not costs:
        return ()
    order = sorted(range(len(costs)), key=lambda place: (-costs[place].tokens, -costs[place].patches))
    found = [Chosen("most tokens", tuple(order[p] for p in heaviest([costs[p].tokens for p in order], micro, packing)))]
    tokens, patches = max(cost.tokens for cost in costs), max(cost.patches for cost in costs)
    if patches:
        by_patches = sorted(order, key=lambda place: -costs[place].patches)
        by_sum = sorted(order, key=lambda p: -(costs[p].tokens / tokens + costs[p].patches / patches))
        found += [Chosen("most crops", tuple(by_patches[:micro])), Chosen("largest sum", tuple(by_sum[:micro]))]
    kept: list[Chosen] = []
    for chosen in found:
        whole = tuple(chosen.places[place % len(chosen.places)] for place in range(micro))
        if not any(sorted(other.places) == sorted(whole) for other in kept):
            kept.append(Chosen(chosen.reason, whole))
    return tuple(kept)
