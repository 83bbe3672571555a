"""What `memfit plan` answers: the choice, what else fits, what was refused and by how much, and what would help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memfit.specs.plan import Plan
from memfit.specs.sweep import Sweep


@dataclass(frozen=True)
class Refused:
    """The least that a set-up would need more: `short_by_bytes` are missing on the GPU or in the node's memory.

    `levers`: dotted keys of the recipe with the values that came closest. `at_least`: no step was traced for it,
    because states and a lower bound of everything else are too much already; the true figure is not smaller.
    `candidates`: how many differ from it only in values that change less.
    """

    levers: Mapping[str, Any]
    reason: str
    short_by_bytes: int
    at_least: bool
    candidates: int


@dataclass(frozen=True)
class Nearest:
    """A change outside of what was searched that makes a plan possible, and what it gives."""

    change: str
    gives: str


@dataclass(frozen=True)
class Offer:
    """A set-up that would be faster and is not taken: `why` it is not, and what it `gives`."""

    levers: Mapping[str, Any]
    why: str
    gives: str


@dataclass(frozen=True)
class Point:
    """One combination of set-up and step, whatever became of it, with the values of the engine that come closest.

    `levers`: dotted keys, every lever that was searched; `engine`: values off their defaults. `gpu_bytes`: what the
    process takes on a card (None on CPU ranks), `host_bytes`: a node. `state`: "fits" (forecast whole), "refused"
    (`short_by_bytes` are missing in `place`) or "untried": bytes and seconds are then lower bounds, and one that is
    faster or of a lower tier was found first. `exact`: the figures are no lower bounds. `why`: why it may not be
    taken, if so.
    """

    levers: Mapping[str, Any]
    engine: Mapping[str, Any]
    tier: int
    state: str
    seconds: float
    gpu_bytes: int | None
    host_bytes: int
    short_by_bytes: int
    place: str
    exact: bool
    why: str


@dataclass(frozen=True)
class Answer:
    """A question people ask of every plan, its answer in words, and the figure in it (None where there is none)."""

    question: str
    answer: str
    value: int | None = None


@dataclass(frozen=True)
class SearchResult:
    """The answer of one search. `ranked[0]` is `chosen`; `searched` counts distinct, compatible candidates.

    `seconds`: of the search, traces that were not cached included. `samples`: to train on, None where not counted.
    `timed`: seconds are known, and not an order alone. `capacity_bytes`: of one card, or of a node for CPU ranks; None
    where that is not known.
    """

    chosen: Plan | None
    ranked: tuple[Plan, ...]
    refused: tuple[Refused, ...]
    nearest: tuple[Nearest, ...]
    searched: int
    seconds: float
    offers: tuple[Offer, ...] = ()
    samples: int | None = None
    sweep: Sweep | None = None
    points: tuple[Point, ...] = ()
    capacity_bytes: int | None = None
    answers: tuple[Answer, ...] = ()
    timed: bool = False
