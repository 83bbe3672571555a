"""Two forecasts joined term by term: what only one of them has, what changed, and what is the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RunFacts:
    """One of the two runs: how it is called, its verdict, and its figures in bytes (None where not forecast).

    `phases`: bytes where the states are (a GPU, or the node's memory on CPU ranks) by phase; None for a phase that is
    not forecast whole. `known`: the same for the terms that there are.
    """

    name: str
    verdict: str
    fits: bool | None
    peak_phase: str | None
    allocated: int | None
    reserved: int | None
    process: int | None
    capacity: int | None
    phases: dict[str, int | None]
    known: dict[str, int]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class TermChange:
    """One term of either run. `first` or `second` is None where that run has no such term."""

    id: str
    name: str
    part: str
    place: str
    alive: tuple[str, ...]
    first: int | None
    second: int | None

    @property
    def change(self) -> int:
        """Bytes that the second run has more (negative: less)."""
        return (self.second or 0) - (self.first or 0)


@dataclass(frozen=True)
class KeyChange:
    """A recipe key that differs between the two effective recipes."""

    key: str
    first: Any
    second: Any


@dataclass(frozen=True)
class Difference:
    """`changed` holds every term whose bytes or lifetime differ, largest change first; `equal` the others."""

    first: RunFacts
    second: RunFacts
    keys: tuple[KeyChange, ...]
    changed: tuple[TermChange, ...]
    equal: tuple[TermChange, ...]

    def phase_change(self, phase: str) -> int | None:
        """Bytes that the second run has more in a phase; None where one of them has no figure."""
        one, two = self.first.phases.get(phase), self.second.phases.get(phase)
        return None if one is None or two is None else two - one

    @property
    def whole(self) -> bool:
        """Whether both runs have whole figures for at least one phase."""
        return any(self.phase_change(phase) is not None for phase in self.first.phases)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: `terms` are those that changed, each with its `change`; `equal` sums up the rest."""

        def term(row: TermChange) -> dict[str, Any]:
            return {**asdict(row), "alive": list(row.alive), "change": row.change}

        phases = dict.fromkeys([*self.first.phases, *self.second.phases])
        return {
            "schema": 1,
            "first": asdict(self.first) | {"missing": list(self.first.missing)},
            "second": asdict(self.second) | {"missing": list(self.second.missing)},
            "recipe": [asdict(row) for row in self.keys],
            "terms": [term(row) for row in self.changed],
            "equal": {
                "count": len(self.equal),
                "bytes": sum(row.first or 0 for row in self.equal),
                "terms": [term(row) for row in self.equal],
            },
            "phases": {phase: self.phase_change(phase) for phase in phases},
        }
