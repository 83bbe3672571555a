"""What a trace is asked for. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memfit.families.base import Family
from memfit.planner.parts import ResolvedParts
from memfit.specs.recipe import Recipe
from memfit.specs.trace import Device, TraceBatch


@dataclass(frozen=True)
class TraceRequest:
    """What to trace: the model, an effective recipe (no `auto` in its levers), and one micro-batch.

    `accumulated`: gradients of an earlier micro-batch are there already. `replaced`: the rows of `cuda.ROWS` by which
    the engine that runs the step replaces torch's functions.
    """

    family: Family
    config: Mapping[str, Any]
    recipe: Recipe
    parts: ResolvedParts
    batch: TraceBatch
    device: Device = "cpu"
    accumulated: bool = False
    replaced: tuple[str, ...] = ()
