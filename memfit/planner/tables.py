"""Lower bounds of all candidates at once, on arrays: states counted once for each distinct set-up, then broadcast.

States and buffers are those of a ledger, to the byte; of a micro-batch a bound takes the traced peaks and leaves out
what an engine gathers and reduces meanwhile, which is for the exact stage. What a bound refuses cannot fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memfit.catalog.context import outside
from memfit.physics.engine_work import States
from memfit.physics.speed import StepTime, StepWork, step_time
from memfit.planner.axes import Axes, Setup, Step, Trim, trims, with_choice
from memfit.planner.counting import Counting
from memfit.planner.engine_terms import bucket_bytes, engine_terms
from memfit.planner.host_terms import host_terms
from memfit.planner.parts import PartGroup
from memfit.planner.work import ORDER_ONLY, rates_for, states_of, step_work
from memfit.specs.ledger import PHASES, Term
from memfit.specs.trace import TRACED_PHASES, StepTrace
from memfit.specs.workload import LoaderLoad

Bytes = NDArray[np.int64]
BACKWARD = PHASES.index("backward")
# The value of the engine that changes what is counted without a micro-batch, beside the reduce bucket.
COUNTED = "sub_group_size"
BUCKET = "reduce_bucket_size"
NO_STEP = StepTrace("gpu", (), 0, 0, {}, (), (), (), (), ())
NO_LOAD = LoaderLoad(0, 0, 0)


@dataclass(frozen=True)
class Model:
    """What is the same for all candidates: the parts with their tensors, bytes of buffers, and what the loader holds
    for a micro-batch of so many rows."""

    groups: Sequence[PartGroup]
    buffers: int
    load: Callable[[int], LoaderLoad]


@dataclass(frozen=True)
class Room:
    """Bytes that a candidate may take: of one card beside context and libraries, and of one node. None: not known."""

    device: int | None
    host: int | None


@dataclass(frozen=True)
class Moments:
    """The stretches of a traced step as arrays: the phase by its place in PHASES, bytes as in `Stretch`, whether a
    stretch runs `inside` one of the numbered blocks, and the bytes of it that do not grow with the rows, at most."""

    phase: Bytes
    inputs: Bytes
    saved: Bytes
    transient: Bytes
    inside: NDArray[np.bool_]
    fixed: Bytes


@dataclass(frozen=True)
class Figures:
    """Of one micro-batch: bytes by phase without gradients of parameters, and its work. `least_flops`: without what
    checkpointing computes again; `written_once`: of what is written, what does not grow with the rows, at most; `kept`:
    what autograd keeps of the blocks. `held`: what `memfit.planner.steps` has worked out of the moments."""

    peaks: Bytes
    flops: float
    least_flops: float
    written: float
    kernels: float
    pinned: int
    written_once: float = 0.0
    kept: int = 0
    moments: Moments | None = None
    held: dict[tuple[float, bool, bool, bool], Bytes] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Floors:
    """Bytes that every candidate of one set-up takes at least, [trims, steps], on one card and on one node."""

    device: Bytes
    host: Bytes

    def at(self, step: int) -> tuple[Bytes, Bytes]:
        """Those of one step, over all trims."""
        return self.device[:, step], self.host[:, step]


def room_of(axes: Axes) -> Room:
    """The room on this hardware."""
    gpu = axes.hardware.gpu
    free = None if gpu is None else gpu.capacity_bytes - sum(size for _, size, _, _ in outside(axes.hardware))
    return Room(free, axes.hardware.host_memory_bytes)


def phase_bytes(counting: Counting, buffers: int, load: LoaderLoad, pinned: int = 0) -> tuple[Bytes, Bytes]:
    """Bytes of each phase without a micro-batch, [phases]: on one device and on the fullest node.

    On CPU ranks the device is the node: the first is zero. `pinned`: page-locked bytes for activations.
    """
    terms = [term for group in counting.groups for term in counting.group_terms(group)]
    terms += [*counting.step_terms(), *engine_terms(counting)]
    if buffers:
        terms.append(counting.term("buffers", "buffers", "model", buffers, ""))
    terms += host_terms(counting, dataclasses.replace(NO_STEP, pinned=pinned), load)
    return _sums(terms, "gpu"), _sums(terms, "host")


def _sums(terms: Sequence[Term], place: str) -> Bytes:
    found = np.zeros(len(PHASES), dtype=np.int64)
    for term in terms:
        if term.place != place:
            continue
        # In traced phases gradients come one by one: the micro-batch counts them.
        passing = {"gradients", "gradient_copies"} & set(term.id.split(".")[:2]) and term.alive != PHASES
        for at, phase in enumerate(PHASES):
            if phase in term.alive and not (passing and phase in TRACED_PHASES):
                found[at] += term.bytes
    return found


class Tables:
    """Counted set-ups of one search, each made once."""

    def __init__(self, axes: Axes, model: Model) -> None:
        self.axes, self.model = axes, model
        self.trims: dict[Setup, list[Trim]] = {setup: trims(axes, setup) for setup in axes.legal}
        self._phases: dict[Any, tuple[Bytes, Bytes]] = {}
        self._states: dict[Setup, States] = {}
        self._countings: dict[Setup, Counting] = {}
        self._arrays: dict[Setup, tuple[Bytes, Bytes]] = {}

    @property
    def searched(self) -> int:
        """Distinct, compatible candidates."""
        return sum(len(steps) * len(self.trims[setup]) for setup, steps in self.axes.legal.items())

    def counting(self, setup: Setup, step: Step, trim: Trim | None = None) -> Counting:
        """The counting of one candidate."""
        recipe = with_choice(self.axes, setup, step, trim or self.trims[setup][0])
        return Counting(recipe, self.axes.hardware, self.model.groups)

    def states(self, setup: Setup) -> States:
        """Elements and widths for the speed model; no candidate of a set-up differs in them."""
        key = dataclasses.replace(setup, overlap=None, offload="none", offload_to="host")
        if key not in self._states:
            self._states[key] = states_of(self._base_counting(setup))
        return self._states[key]

    def seconds(self, setup: Setup, steps: Sequence[Step], known: Sequence[Figures]) -> StepTime:
        """Seconds of an optimizer step of a set-up, an array over steps. Where the catalogue knows no rates they say an
        order and nothing else."""
        counting = self._base_counting(setup)
        each = int(self.axes.recipe.batch) // self.axes.hardware.ranks
        counts = np.array([each // step.micro_batch for step in steps], dtype=np.float64)
        work = StepWork(
            flops=np.array([one.flops for one in known]),
            micro_batches=counts,
            elementwise_bytes=np.array([one.written for one in known]),
            kernels=np.array([one.kernels for one in known]),
        )
        pinned = np.array([float(one.pinned) for one in known])
        made = step_work(counting, work, self.states(setup), pinned)
        return step_time(made, rates_for(counting) or ORDER_ONLY)

    def least(self, setup: Setup, steps: Sequence[Step], peaks: Bytes) -> Floors:
        """The bounds of a set-up for some of its steps. `peaks` [steps, phases]: bytes of a micro-batch that none of
        them is below."""
        ranks = self.axes.hardware.gpus_per_node
        device, host = self._bases(setup)
        kind = np.array([self.several(step) for step in steps], dtype=np.int64)
        device, host = device[:, kind], host[:, kind]
        batch = np.broadcast_to(peaks, device.shape).copy()
        batch[..., BACKWARD] = np.maximum(batch[..., BACKWARD], self._passing(setup)[:, None])
        if self.axes.hardware.gpu is None:
            host = host + ranks * batch
        else:
            device = device + batch
        return Floors(device.max(axis=-1), host.max(axis=-1))

    def _passing(self, setup: Setup) -> Bytes:
        """Bytes of reduce buckets that live in backward only, [trims]."""
        return self._buckets(setup, stays=False)

    def _bases(self, setup: Setup) -> tuple[Bytes, Bytes]:
        """Phases without a micro-batch, [trims, one or several micro-batches, phases]."""
        if setup not in self._arrays:
            kinds, rows = self._kinds(self.axes.legal[setup]), self.trims[setup]
            counted = [self._counted(setup, trim) for trim in rows]
            distinct = {trim: at for at, trim in enumerate(dict.fromkeys(counted))}
            made = np.array([[self._base(setup, step, trim) for step in kinds] for trim in distinct])
            each = made[np.array([distinct[trim] for trim in counted])]
            on_device, on_host = self._at_place(self._buckets(setup, stays=True)[:, None, None])
            self._arrays[setup] = (each[:, :, 0] + on_device, each[:, :, 1] + on_host)
        return self._arrays[setup]

    def _base_counting(self, setup: Setup) -> Counting:
        if setup not in self._countings:
            self._countings[setup] = self.counting(setup, self.axes.legal[setup][0])
        return self._countings[setup]

    def several(self, step: Step) -> bool:
        """Whether a rank runs several micro-batches before the optimizer's step."""
        return int(self.axes.recipe.batch) > self.axes.hardware.ranks * step.micro_batch

    def _kinds(self, steps: Sequence[Step]) -> list[Step]:
        """A step of one micro-batch and one of several, in this order; the only kind there is stands for both."""
        found = {self.several(step): step for step in steps}
        return [found.get(kind) or next(iter(found.values())) for kind in (False, True)]

    def _counted(self, setup: Setup, trim: Trim) -> Trim:
        """What of a trim changes states and buffers, beside the reduce bucket: page-locked memory, and in the step the
        elements that are stepped at once. In host memory the optimizer steps in place."""
        in_place = setup.offload != "none" and setup.offload_to == "host"
        engine = () if in_place else tuple(pair for pair in trim.engine if pair[0] == COUNTED)
        return Trim(engine, trim.pin_memory)

    def _base(self, setup: Setup, step: Step, counted: Trim) -> tuple[Bytes, Bytes]:
        """Phases of states and buffers without the reduce bucket that stays."""
        key = (dataclasses.replace(setup, overlap=None), self.several(step), counted)
        if key not in self._phases:
            device, host = phase_bytes(self.counting(setup, step, counted), self.model.buffers, NO_LOAD)
            on_device, on_host = self._at_place(self._buckets(setup, stays=True)[:1])
            self._phases[key] = (device - on_device, host - on_host)
        return self._phases[key]

    def _at_place(self, sizes: Bytes) -> tuple[Any, Any]:
        """Bytes of every rank, on a card and on a node."""
        return (sizes, 0) if self.axes.hardware.gpu else (0, sizes * self.axes.hardware.gpus_per_node)

    def _buckets(self, setup: Setup, stays: bool) -> Bytes:
        """Bytes of the reduce buckets where they live always (`stays`), or where they do not, [trims]."""
        engine, rows = self._base_counting(setup).layout.engine, self.trims[setup]
        each = bucket_bytes(dataclasses.replace(engine, bucket_elements=1)) if engine.bucket_stays is stays else 0
        usual = engine.bucket_elements
        return each * np.array([dict(trim.engine).get(BUCKET, usual) for trim in rows], dtype=np.int64)
