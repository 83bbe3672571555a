"""What is known of traced steps, and what that says of steps that are not traced yet: never more bytes or seconds than
they will turn out to take, so that a search in this order misses nothing.

It rests on orders that every step keeps, moment by moment: checkpointing less keeps more and computes less; another
loss makes no other blocks, and chunks no fewer products (one chunk for all holds more than whole logits); activations
in host memory leave what is not kept where it is; more rows hold more, and so in proportion, chunks of logits excepted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memfit.physics.rates import TRAFFIC_PER_WRITTEN
from memfit.planner.axes import Step
from memfit.planner.counting import Counting, roles_of
from memfit.planner.tables import Bytes, Figures, Moments
from memfit.specs.ledger import PHASES
from memfit.specs.stretch import Stretch
from memfit.specs.trace import TRACED_PHASES, StepTrace

# Bounds from other steps are taken this much lower: rounding to whole kernels and windows is not quite in proportion.
CAUTION = 0.9
# The same of the work of a step that differs in nothing but more rows.
ROWS_CAUTION = 0.98
# Of products under another engine, which replaces operators: ZeRO-3 and FSDP2 are 7% apart in MiniCPM-o 2.6. What they
# write besides says nothing: under autocast it is twice as much.
ENGINE_CAUTION = 0.8
ORDER = {"none": 0, "selective": 1, "full": 2}
Sizes = tuple[int, ...]  # of a micro-batch, what its bytes and work grow with: padded tokens, patches, trained tokens


@dataclass(frozen=True)
class Fixed:
    """Bytes that do not grow with the rows, at most: weights cast under autocast, and a parameter's gradient before it
    is put away, of the largest parameter inside the blocks and outside."""

    cast: int = 0
    inside: int = 0
    outside: int = 0


NO_FIXED = Fixed()


def fixed_of(counting: Counting) -> Fixed:
    """What does not grow with the rows of a counted step. Autocast copies fp32 weights, and their gradients are there
    in both dtypes; block-wise engines gather in the dtype of computation, and leave nothing to copy."""
    casts = counting.recipe.levers.autocast is True and counting.layout.engine.gather != "block"
    cast, largest = 0, [0, 0]
    for group in counting.groups:
        for role, rows in roles_of(group):
            width = counting.width(role)
            copied = 2 if casts and width > 2 else 0
            for row in rows:
                outside = not _in_block(row.name)
                largest[outside] = max(largest[outside], row.numel * (width + copied))
                cast += row.numel * copied
    return Fixed(cast, *largest)


def _in_block(name: str) -> bool:
    """Whether a module or parameter is one of a numbered block: its name has the number."""
    return any(piece.isdigit() for piece in name.split("."))


def figures_of(trace: StepTrace, fixed: Fixed = NO_FIXED) -> Figures:
    """The figures of a trace."""
    peaks = np.zeros(len(PHASES), dtype=np.int64)
    for row in trace.activation_peaks:
        peaks[PHASES.index(row.phase)] = row.bytes
    flops = {phase: float(sum(row.flops for row in trace.flops if row.phase == phase)) for phase in TRACED_PHASES}
    total = sum(flops.values())
    return Figures(
        peaks=peaks,
        flops=total,
        # Nothing is computed again more than once, and only what forward and loss compute.
        least_flops=total - flops["forward"] - flops["loss"],
        written=float(TRAFFIC_PER_WRITTEN * (trace.written or 0)),
        kernels=float(trace.kernels or 0),
        pinned=trace.pinned,
        written_once=float(TRAFFIC_PER_WRITTEN * (sum(trace.gradients.values()) + 3 * fixed.cast)),
        kept=sum(row.bytes for row in trace.saved if row.block is not None),
        moments=moments_of(trace.stretches, fixed),
    )


def moments_of(stretches: Sequence[Stretch], fixed: Fixed) -> Moments:
    """The stretches as arrays. A block's modules have its number in their names."""
    known: dict[str, bool] = {}
    for row in stretches:
        if row.module not in known:
            known[row.module] = _in_block(row.module)
    phase = np.array([PHASES.index(row.phase) for row in stretches], dtype=np.int64)
    inside = np.array([known[row.module] for row in stretches], dtype=bool)
    made = np.where(inside, fixed.inside, fixed.outside)
    return Moments(
        phase=phase,
        inputs=np.array([row.inputs for row in stretches], dtype=np.int64),
        saved=np.array([row.saved for row in stretches], dtype=np.int64),
        transient=np.array([row.transient for row in stretches], dtype=np.int64),
        inside=inside,
        fixed=fixed.cast + np.where(phase == PHASES.index("backward"), made, 0),
    )


NOTHING = Figures(np.zeros(len(PHASES), dtype=np.int64), 0.0, 0.0, 0.0, 0.0, 0)


@dataclass(frozen=True)
class Way:
    """How a step differs from a traced one: rows by `ratio`, logits in chunks of a fixed size (`chunked`), another loss
    so that nothing is known of logits (`no_logits`), nothing certain of what autograd keeps (`moved`)."""

    ratio: float
    chunked: bool
    no_logits: bool
    moved: bool


@dataclass
class Known:
    """Traced steps by the kind of engine they ran under. `sizes`: of the micro-batch of so many rows.

    `accumulated` steps add gradients to those of an earlier micro-batch, and hold each of them twice for a moment:
    they say nothing of steps that do not.
    """

    sizes: Callable[[int], Sizes]
    traced: dict[Hashable, dict[tuple[Step, bool], Figures]] = field(default_factory=dict)
    _least: dict[tuple[Hashable, Step, bool], Figures] = field(default_factory=dict)

    def add(self, kind: Hashable, step: Step, figures: Figures, accumulated: bool = False) -> None:
        """Keep the figures of a traced step."""
        self.traced.setdefault(kind, {})[_plain(step), accumulated] = figures
        self._least.clear()

    def get(self, kind: Hashable, step: Step, accumulated: bool = False) -> Figures | None:
        """The figures of a traced step, None before."""
        return self.traced.get(kind, {}).get((_plain(step), accumulated))

    def has_family(self, kind: Hashable, step: Step, accumulated: bool = False) -> bool:
        """Whether a step that differs in its rows only was traced, and says something of this one."""
        return any(_same_but_rows(step, other) for other, _ in self._bounding(kind, accumulated))

    def least(self, kind: Hashable, step: Step, accumulated: bool = False) -> Figures:
        """The figures of a step: its own, or bounds from below by every step that was traced under any engine."""
        own = self.get(kind, step, accumulated)
        if own is not None:
            return own
        key = (kind, _plain(step), accumulated)
        if key not in self._least:
            self._least[key] = self._bounds(kind, step, accumulated)
        return self._least[key]

    def _bounds(self, kind: Hashable, step: Step, accumulated: bool) -> Figures:
        mine = [(other, one) for (other, _), one in self.traced.get(kind, {}).items()]
        work = [self._bound(step, other, one) for other, one in mine]
        for other_kind, rows in self.traced.items():
            if other_kind != kind:
                work += [_cautious(self._bound(step, other, one)) for (other, _), one in rows.items()]
        held = [self._bound(step, other, one) for other, one in self._bounding(kind, accumulated)]
        best = NOTHING if not work else max(work, key=lambda one: one.flops)
        return dataclasses.replace(
            best,
            peaks=np.max(np.stack([one.peaks for one in held] or [NOTHING.peaks]), axis=0),
            written=max((one.written for one in work), default=0.0),
            kernels=max((one.kernels for one in work), default=0.0),
            pinned=max((one.pinned for one in held), default=0),
        )

    def _bounding(self, kind: Hashable, accumulated: bool) -> Iterator[tuple[Step, Figures]]:
        for (other, twice), figures in self.traced.get(kind, {}).items():
            if accumulated or not twice:
                yield other, figures

    def _bound(self, step: Step, other: Step, known: Figures) -> Figures:
        return bound(step, other, known, _ratio(self.sizes(step.micro_batch), self.sizes(other.micro_batch)))


def _cautious(one: Figures) -> Figures:
    """The work of a step as another engine runs it, at least."""
    flops = ENGINE_CAUTION * one.flops
    return dataclasses.replace(one, flops=flops, least_flops=flops, written=0.0, kernels=0.0)


def _ratio(mine: Sizes, others: Sizes) -> float:
    """How many times as large one micro-batch is, by what has grown least: samples of real data differ."""
    return min((one / other for one, other in zip(mine, others, strict=True) if other), default=1.0)


def bound(step: Step, other: Step, known: Figures, ratio: float) -> Figures:
    """What `step` takes at least, as far as `other` says. `ratio`: how many times as large its micro-batch is."""
    share = ROWS_CAUTION if ratio >= 1 and _same_but_rows(step, other) else CAUTION
    peaks = NOTHING.peaks
    if _less_checkpointed(step.checkpointing, other.checkpointing):
        way = Way(
            ratio=ratio,
            chunked=other.loss != "full-logits",
            no_logits=step.loss != other.loss,
            moved=step.activation_offload and not other.activation_offload,
        )
        peaks = (CAUTION * held(known, way)).astype(np.int64)
    # What computes no less than `other`: a step that is checkpointed as much and more.
    more = _less_checkpointed(other.checkpointing, step.checkpointing) and other.loss in ("full-logits", step.loss)
    flops = (known.flops if more else known.least_flops) * ratio * share
    other_share = share if more else 0.5
    # Gradients of parameters are written once, however many rows there are.
    once = min(known.written, known.written_once)
    return Figures(
        peaks=peaks,
        flops=flops,
        least_flops=flops,
        written=((known.written - once) * ratio + once * min(1.0, ratio)) * other_share,
        # Adding to gradients that wait is a kernel for each of them.
        kernels=known.kernels * min(CAUTION, other_share) * min(1.0, ratio),
        pinned=int(CAUTION * ratio * _moved(step, other, known)),
    )


def _moved(step: Step, other: Step, known: Figures) -> int:
    """Bytes that a step moves to host memory for the rows of `other`, at least: inputs of the layers it checkpoints,
    which are all that a fully checkpointed step keeps of its blocks."""
    if not step.activation_offload:
        return 0
    if other.activation_offload:
        return known.pinned
    return known.kept if other.checkpointing == "full" and isinstance(step.checkpointing, str) else 0


def held(known: Figures, way: Way) -> Bytes:
    """Bytes of each phase at the moments of a traced step, as far as they are there in a step that differs by `way`.

    What does not grow with the rows is taken once where there are more of them, and in proportion where there are
    fewer: both are the less.
    """
    key = (way.ratio, way.chunked, way.no_logits, way.moved)
    if key not in known.held:
        known.held[key] = _held(known, way)
    return known.held[key]


def _held(known: Figures, way: Way) -> Bytes:
    rows, found = known.moments, np.zeros(len(PHASES), dtype=np.int64)
    if rows is None or not len(rows.phase):
        return found
    grows, stays = rows.inputs + rows.transient, np.zeros_like(rows.inputs)
    if not way.moved:
        grows = grows + rows.saved
    if way.chunked:
        logits = ~rows.inside & (rows.phase != PHASES.index("forward"))
        grows, stays = np.where(logits, grows - rows.transient, grows), np.where(logits, rows.transient, 0)
    fixed = np.minimum(grows, rows.fixed)
    grows, stays = grows - fixed, stays + fixed
    total: NDArray[np.float64] = grows * way.ratio + stays * min(1.0, way.ratio)
    for phase in np.unique(rows.phase):
        mine = rows.phase == phase
        if way.no_logits:
            # What the head and the loss hold is another matter; blocks are the same.
            mine &= rows.inside
        if mine.any():
            found[phase] = int(total[mine].max())
    return found


def _less_checkpointed(mine: object, other: object) -> bool:
    """Whether `mine` keeps at least what `other` keeps; what is set part by part is compared with itself only."""
    if isinstance(mine, Mapping) or isinstance(other, Mapping):
        return mine == other
    one, two = str(mine), str(other)
    return one == two or ORDER.get(one, 99) <= ORDER.get(two, -1)


def _same_but_rows(one: Step, other: Step) -> bool:
    mine = (one.checkpointing, one.loss, one.activation_offload)
    return mine == (other.checkpointing, other.loss, other.activation_offload)


def _plain(step: Step) -> Step:
    """The step without what is said about it; checkpointing part by part becomes a text that can be a key."""
    said = step.checkpointing
    return dataclasses.replace(step, checkpointing=said if isinstance(said, str) else str(said), tier=1, would=())
