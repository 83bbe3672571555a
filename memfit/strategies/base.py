"""What a strategy file states: its layout, as numbers, and what its engine does to dtypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memfit.specs.plan import Layout


@dataclass(frozen=True)
class Strategy:
    """One value of `levers.parallel`.

    `layout(ranks)` gives the numbers. `casts_adapters` lists the precisions under which the engine turns adapters into
    the dtype of the other parameters that learn. `not_forecast`: engine buffers that are no states, in plain words.
    """

    name: str
    layout: Callable[[int], Layout]
    source: str
    casts_adapters: frozenset[str] = frozenset()
    not_forecast: tuple[str, ...] = ()
    min_ranks: int = 1
    max_ranks: int | None = None
