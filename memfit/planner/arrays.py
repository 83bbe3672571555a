"""Many candidates at once: the same physics on numpy arrays, one element a candidate.

The counts and widths of each candidate come from its rows, as for a ledger; every product and sum is one array
operation. What this gives for a candidate equals the sums of its ledger to the byte (a test holds it to that).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memfit.physics.engine import peak_places
from memfit.physics.memory import PartStates
from memfit.planner.counting import Counting
from memfit.planner.engine_stages import Stages
from memfit.planner.engine_terms import engine_terms
from memfit.specs.ledger import PHASES
from memfit.specs.trace import TRACED_PHASES

NUMBERS = [field.name for field in dataclasses.fields(PartStates) if field.name not in ("part", "role")]
TEXTS = {"optimizer_formula"}


@dataclass(frozen=True)
class Candidate:
    """One choice of layout and levers with its traced step; `buffers`: bytes of what is no parameter."""

    counting: Counting
    stages: Stages
    buffers: int = 0


def device_totals(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Bytes of each phase but evaluation on one device of each candidate (int64 arrays): states, engine and the peak
    of the traced step. Candidates share the model's parts and the stretches' phases."""
    states = _states(candidates)
    constants = [_constants(one) for one in candidates]
    engine = {phase: np.array([one[phase] for one in constants]) for phase in PHASES}
    peaks = _peaks(candidates)
    return {phase: states[phase] + engine[phase] + peaks.get(phase, 0) for phase in PHASES if phase != "evaluate"}


def _states(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Bytes of states alive in each phase, part by part and role by role."""
    totals = {phase: np.zeros(len(candidates), dtype=np.int64) for phase in PHASES}
    rows = [[one for group in each.counting.groups for one in each.counting.states(group)] for each in candidates]
    for slot in zip(*rows, strict=True):
        values: dict[str, Any] = {
            name: np.array([_number(one, name) for one in slot]) for name in NUMBERS if name not in TEXTS
        }
        together = PartStates(part=slot[0].part, role=slot[0].role, **values)
        for kind, sizes in together.bytes().items():
            for phase in PHASES:
                totals[phase] += sizes * np.array([_alive(each.counting, kind, phase) for each in candidates])
    return totals


def _number(states: PartStates, name: str) -> int:
    value = getattr(states, name)
    return states.width if name == "gradient_width" and value is None else value


def _alive(counting: Counting, kind: str, phase: str) -> int:
    """1 where a kind of state counts on the device in a phase: gradients are counted one by one in traced phases."""
    home = "host" if kind == "paged" else counting.site.homes.get(kind, counting.site.place)
    alive = counting.alive.of(kind)
    passing = kind in ("gradients", "gradient_copies") and alive != PHASES and phase in TRACED_PHASES
    return int(home == counting.site.place and phase in alive and not passing) * counting.site.ranks(
        counting.site.place
    )


def _constants(candidate: Candidate) -> dict[str, int]:
    """Bytes in each phase of terms that no state and no micro-batch makes."""
    counting = candidate.counting
    terms = [*engine_terms(counting), *counting.step_terms()]
    terms += [term for group in counting.groups for term in counting.quant_terms(group)]
    place = counting.site.place
    buffers = candidate.buffers * counting.site.ranks(place)
    own = [term for term in terms if term.place == place]
    return {phase: buffers + sum(term.bytes for term in own if phase in term.alive) for phase in PHASES}


def _peaks(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Bytes at the largest moment of each traced phase: activations and what the engine adds, [candidates, stages]."""
    stretches = candidates[0].stages.stretches
    totals = np.array([[row.activations for row in one.stages.stretches] for one in candidates], dtype=np.int64)
    for name in candidates[0].stages.pieces:
        totals = totals + np.array([one.stages.pieces[name] for one in candidates], dtype=np.int64)
    places = peak_places([row.phase for row in stretches], totals)
    ranks = np.array([one.counting.site.ranks(one.counting.site.place) for one in candidates])
    every = np.arange(len(candidates))
    return {phase: totals[every, place] * ranks for phase, place in places.items()}
