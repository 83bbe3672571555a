"""What is known of traced steps, and what that says of steps that are not traced yet: never more bytes or seconds than
they will turn out to take, so that a search in this order misses nothing.

It rests on four orders that every step keeps: checkpointing less keeps more and computes less; logits in chunks and
activations in host memory hold less and take longer; more rows hold more, and their work is in proportion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from memfit.physics.rates import TRAFFIC_PER_WRITTEN
from memfit.planner.axes import Step
from memfit.planner.tables import Figures
from memfit.specs.ledger import PHASES
from memfit.specs.trace import TRACED_PHASES, StepTrace

# Bounds from other steps are taken this much lower: rounding to whole kernels and windows is not quite in proportion.
CAUTION = 0.9
WITH_GRAPH = np.array([phase in ("loss", "backward") for phase in PHASES])
ORDER = {"none": 0, "selective": 1, "full": 2}


def figures_of(trace: StepTrace, fixed: int = 0) -> Figures:
    """The figures of a trace."""
    peaks = np.zeros(len(PHASES), dtype=np.int64)
    for row in trace.activation_peaks:
        peaks[PHASES.index(row.phase)] = row.bytes
    flops = {phase: float(sum(row.flops for row in trace.flops if row.phase == phase)) for phase in TRACED_PHASES}
    total = sum(flops.values())
    return Figures(
        peaks=peaks,
        fixed=fixed,
        flops=total,
        # Nothing is computed again more than once, and only what forward and loss compute.
        least_flops=total - flops["forward"] - flops["loss"],
        written=float(TRAFFIC_PER_WRITTEN * (trace.written or 0)),
        kernels=float(trace.kernels or 0),
        pinned=trace.pinned,
        again=_kept_again(trace),
        logits=sum(row.bytes - row.saved for row in trace.activation_peaks if row.phase == "loss"),
    )


def _kept_again(trace: StepTrace) -> int:
    """What autograd keeps grows in backward only where something is computed again."""
    saved = [row.saved for row in trace.stretches if row.phase == "backward"]
    return sum(max(0, after - before) for before, after in pairwise(saved))


NOTHING = Figures(np.zeros(len(PHASES), dtype=np.int64), 0, 0.0, 0.0, 0.0, 0.0, 0)


@dataclass
class Known:
    """Traced steps by the kind of engine they ran under. `traced[kind][step]`."""

    traced: dict[Hashable, dict[Step, Figures]] = field(default_factory=dict)

    def add(self, kind: Hashable, step: Step, figures: Figures) -> None:
        self.traced.setdefault(kind, {})[step] = figures

    def get(self, kind: Hashable, step: Step) -> Figures | None:
        """The figures of a traced step, None before."""
        return self.traced.get(kind, {}).get(step)

    def least(self, kind: Hashable, step: Step) -> Figures:
        """The figures of a step: its own, or bounds from below by every step that was traced under any engine."""
        own = self.get(kind, step)
        if own is not None:
            return own
        found = [bound(step, other, figures) for rows in self.traced.values() for other, figures in rows.items()]
        # Engines differ in what a step holds, but not in its work.
        same = [bound(step, other, figures) for other, figures in self.traced.get(kind, {}).items()]
        peaks = [one.peaks for one in same] or [NOTHING.peaks]
        best = NOTHING if not found else max(found, key=lambda one: one.flops)
        return dataclasses.replace(
            best,
            peaks=np.max(np.stack(peaks), axis=0),
            written=max((one.written for one in found), default=0.0),
            kernels=max((one.kernels for one in found), default=0.0),
            pinned=max((one.pinned for one in same), default=0),
        )


def bound(step: Step, other: Step, known: Figures) -> Figures:
    """What `step` takes at least, as far as `other` says."""
    ratio = step.micro_batch / other.micro_batch
    holds_more = _less_checkpointed(step.checkpointing, other.checkpointing) and not (
        (step.loss != "full-logits" and other.loss == "full-logits")
        or (step.activation_offload and not other.activation_offload)
    )
    peaks = NOTHING.peaks
    if holds_more:
        growing = np.maximum(known.peaks - known.fixed, 0)
        still = np.minimum(known.peaks, known.fixed) if ratio >= 1 else 0
        peaks = (CAUTION * (still + growing * ratio)).astype(np.int64)
    if (str(step.checkpointing), str(other.checkpointing), other.loss) == ("none", "full", "full-logits"):
        kept = max(0, known.again - known.fixed) * ratio
        kept += known.logits * ratio if step.loss == "full-logits" else 0
        peaks = np.maximum(peaks, np.where(WITH_GRAPH, CAUTION * kept, 0).astype(np.int64))
    # What computes no less than `other`: a step that is checkpointed as much and more.
    more = _less_checkpointed(other.checkpointing, step.checkpointing) and other.loss in ("full-logits", step.loss)
    flops = (known.flops if more else known.least_flops) * ratio * CAUTION
    share = CAUTION if more else 0.5
    same_moves = step.activation_offload and other.activation_offload
    return Figures(
        peaks=peaks,
        fixed=0,
        flops=flops,
        least_flops=flops,
        written=known.written * ratio * share,
        kernels=known.kernels * share * min(1.0, ratio),
        pinned=int(known.pinned * ratio * CAUTION) if same_moves else 0,
    )


def _less_checkpointed(mine: object, other: object) -> bool:
    """Whether `mine` keeps at least what `other` keeps; what is set part by part is compared with itself only."""
    if isinstance(mine, Mapping) or isinstance(other, Mapping):
        return mine == other
    one, two = str(mine), str(other)
    return one == two or ORDER.get(one, 99) <= ORDER.get(two, -1)
