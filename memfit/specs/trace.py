"""One traced training step: what is allocated and freed, what autograd keeps, what lives for a moment, and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from memfit.specs.stretch import Stretch
from memfit.specs.workload import ImageCost

Device = Literal["cpu", "gpu"]
# Phases that a trace covers, in order; the optimizer's step is added by physics.
TRACED_PHASES = ("forward", "loss", "backward")
OUTSIDE = "model"  # the part of what runs in no part of the family: the outermost forward, the loss


class Row(NamedTuple):
    """One sample of a micro-batch: its tokens, the costs of its pictures, and how many of its tokens carry loss.

    `trained` None means all of them.
    """

    tokens: int
    images: tuple[ImageCost, ...] = ()
    trained: int | None = None


@dataclass(frozen=True)
class TraceBatch:
    """One micro-batch as numbers: tokens of every row (image tokens included), and the pictures of every row.

    Rows of different lengths are padded to the longest, as the collator does. `trained`: tokens of every row that carry
    loss, its last ones; empty means all. It matters only to losses that look at nothing else.
    """

    rows: tuple[int, ...]
    images: tuple[tuple[ImageCost, ...], ...] = ()
    trained: tuple[int, ...] = ()


class Event(NamedTuple):
    """One step of an allocator's life.

    kind: "alloc", "free", "gradient" (from now on the storage is a parameter's gradient; `path` is the parameter) or
    "phase" (`phase` begins). `bytes` are those asked for, not rounded. `path`: the module that ran, `op`: the operator.
    """

    kind: str
    storage: int
    bytes: int
    phase: str
    path: str
    op: str


class Moment(NamedTuple):
    """Bytes alive after event number `at` of a step, by kind as in `PeakRow`."""

    at: int
    phase: str
    inputs: int
    saved: int
    transient: int
    gradients: int

    @property
    def bytes(self) -> int:
        return self.inputs + self.saved + self.transient + self.gradients


@dataclass(frozen=True)
class SavedRow:
    """Bytes that autograd keeps between forward and backward, by the part and block that made them."""

    part: str
    block: int | None
    bytes: int


@dataclass(frozen=True)
class PeakRow:
    """The most bytes alive in one phase, states excepted, and what they were at that moment.

    `bytes` = `inputs` + `saved` + `transient` + `gradients`. `saved` is what autograd keeps for backward, `transient`
    everything else. `part`, `block` and `op` ran at that moment.
    """

    phase: str
    bytes: int
    inputs: int
    saved: int
    transient: int
    gradients: int
    part: str
    block: int | None
    op: str


@dataclass(frozen=True)
class PartPeak:
    """The most transient bytes (neither saved nor gradients nor inputs) while one block of a part runs in a phase."""

    phase: str
    part: str
    block: int | None
    transient: int


@dataclass(frozen=True)
class FlopsRow:
    """Floating-point operations of matrix products, convolutions and attention; a multiply-add counts 2."""

    phase: str
    part: str
    flops: int


@dataclass(frozen=True)
class StepTrace:
    """One traced step of one micro-batch.

    `device` is what was traced ("cpu" or "gpu"), `substitutions` the names of the rows that stood in for its kernels.
    `peaks` hold the largest sum of a phase; `activation_peaks` the largest without gradients. `gradients` are bytes by
    part at the end of backward; `inputs` those of the batch; `parameters` those of all parameters and buffers.
    `pinned` is page-locked host memory, rounded as torch rounds it, for activations that wait there.
    `timeline` is the thinned course of the step, `stretches` the same cut where an engine acts. `written` bytes were
    put into new tensors by `kernels` operators; None in a trace from before they were counted.
    """

    device: Device
    substitutions: tuple[str, ...]
    inputs: int
    parameters: int
    gradients: Mapping[str, int]
    saved: tuple[SavedRow, ...]
    peaks: tuple[PeakRow, ...]
    activation_peaks: tuple[PeakRow, ...]
    parts: tuple[PartPeak, ...]
    flops: tuple[FlopsRow, ...]
    versions: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    pinned: int = 0
    timeline: tuple[Moment, ...] = ()
    stretches: tuple[Stretch, ...] = field(default=(), repr=False)
    events: tuple[Event, ...] = field(default=(), repr=False, compare=False)
    written: int | None = None
    kernels: int | None = None

    @property
    def saved_bytes(self) -> int:
        """All that autograd keeps between forward and backward."""
        return sum(row.bytes for row in self.saved)

    def saved_by_part(self) -> dict[str, int]:
        """Saved bytes of every part."""
        found: dict[str, int] = {}
        for row in self.saved:
            found[row.part] = found.get(row.part, 0) + row.bytes
        return found

    def peak(self, phase: str) -> PeakRow:
        """The peak of one phase. KeyError for a phase that is not traced."""
        for row in self.peaks:
            if row.phase == phase:
                return row
        raise KeyError(phase)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the events are left out."""
        # Rows by hand: asdict walks every number of thousands of them.
        values = asdict(replace(self, events=(), stretches=()))
        del values["events"]
        return {**values, "stretches": [list(row) for row in self.stretches]}
