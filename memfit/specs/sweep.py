"""A sweep: one plan forecast again and again with one key of the recipe at other values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memfit.specs.plan import Forecast


@dataclass(frozen=True)
class SweepRow:
    """One value of the key. `forecast` is None where the value is impossible; `problem` then says why, in one line."""

    value: Any
    forecast: Forecast | None
    problem: str = ""


@dataclass(frozen=True)
class Sweep:
    """`key` is a dotted key of the recipe; `held` says in words which plan was held while it moved."""

    key: str
    rows: tuple[SweepRow, ...]
    held: str
