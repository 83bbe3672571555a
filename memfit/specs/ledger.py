"""The ledger: all named amounts of bytes of one run. Every total is a sum of terms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Place = Literal["gpu", "allocator", "context", "comm", "host", "disk"]
PHASES = ("load", "forward", "loss", "backward", "step", "evaluate", "save")


@dataclass(frozen=True)
class Term:
    """One amount of bytes on the worst rank (place host: on the fullest node with all its ranks).

    `id` is stable across versions, so that forecasts and measurements join. `alive`: the phases in which it exists.
    `formula` is what `--why ID` prints beside `source`.
    """

    id: str
    name: str
    part: str
    place: Place
    alive: tuple[str, ...]
    bytes: int
    source: str
    formula: str = ""

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        row["alive"] = list(self.alive)
        return row


@dataclass(frozen=True)
class Ledger:
    """The terms, and the groups of terms that this version cannot forecast yet (`missing`, in plain words)."""

    terms: tuple[Term, ...]
    missing: tuple[str, ...] = ()

    def at(self, place: str) -> tuple[Term, ...]:
        return tuple(term for term in self.terms if term.place == place)

    def phase_bytes(self, place: str = "gpu") -> dict[str, int]:
        """Bytes of `place` alive in each phase."""
        return {phase: total(t for t in self.at(place) if phase in t.alive) for phase in PHASES}


def total(terms: Iterable[Term]) -> int:
    return sum(term.bytes for term in terms)
