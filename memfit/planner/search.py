"""The search: from all candidates on arrays to the fastest that fit, each judged by the one physics.

Candidates are taken in the order of a lower bound of their seconds. One whose lower bound of bytes exceeds the room is
refused without a trace; one whose step is not traced yet is traced and put back; the others are walked exactly, and
what fits there is forecast whole, the allocator's replay included. So what is found first is the fastest that fits.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from memfit.physics.speed import TYPICAL_ERROR
from memfit.planner.activations import peaks_of
from memfit.planner.axes import Axes, Setup, Step, Trim, ladder, reverted, with_choice
from memfit.planner.counting import Counting
from memfit.planner.engine_stages import Stages
from memfit.planner.problems import as_error
from memfit.planner.steps import Known, figures_of, fixed_of
from memfit.planner.tables import Bytes, Floors, Model, Room, Tables, phase_bytes, room_of
from memfit.planner.verdict import gpu_room, host_room
from memfit.specs.ledger import PHASES
from memfit.specs.plan import Forecast
from memfit.specs.recipe import Recipe
from memfit.specs.trace import StepTrace

ALLOWED_TIER = {"nothing": 1, "rounding": 2, "learning": 3}
WANTED = 10


class Tracer(Protocol):
    """Who traces steps and makes whole forecasts; both keep what they made."""

    def kind(self, counting: Counting) -> Hashable:
        """What two steps must share beside their levers to be alike: dtypes as they run, what the engine replaces."""
        ...

    def sizes(self, micro: int) -> tuple[int, ...]:
        """What bytes and work of the micro-batch of so many rows grow with: padded tokens, patches, trained tokens."""
        ...

    def step(self, counting: Counting) -> tuple[StepTrace, Stages]:
        """The traced step of a candidate, and its stretches under the engine."""
        ...

    def forecast(self, recipe: Recipe) -> Forecast:
        """The whole forecast of a recipe whose levers have values all."""
        ...


@dataclass(frozen=True)
class Candidate:
    """One choice of everything."""

    setup: Setup
    step: Step
    trim: Trim

    @property
    def tier(self) -> int:
        return max(self.setup.tier, self.step.tier)


@dataclass(frozen=True)
class Fit:
    """A candidate that fits, its seconds by which it is ranked (see `Search._weighed`) and its whole forecast.

    `lacks`: bytes that are missing with the engine's default values, where the trim takes others.
    """

    candidate: Candidate
    seconds: float
    forecast: Forecast
    lacks: int = 0


@dataclass(frozen=True)
class Miss:
    """A set-up and step that do not fit with any trim: the closest of them, and what it lacks where.

    `bound`: the figure is a lower bound: it is too much already without what an engine holds meanwhile.
    """

    candidate: Candidate
    seconds: float
    place: str  # gpu | host
    short: int
    bound: bool


@dataclass
class Outcome:
    """What one search found. `fits`: one for each set-up, fastest first."""

    fits: list[Fit] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    searched: int = 0
    refused_by_bounds: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Limits:
    """Which candidates a search may take, how many fits end it, and the seconds above which none is of interest."""

    admits: Callable[[Setup, Step], bool]
    wanted: int = WANTED
    below: float = float("inf")


class Search:
    """One search over the axes of a recipe. `say` hears of every step that is traced."""

    def __init__(self, axes: Axes, model: Model, tracer: Tracer) -> None:
        if not axes.legal:
            raise as_error(axes.problems)
        self.axes, self.model, self.tracer = axes, model, tracer
        self.tables, self.room, self.known = Tables(axes, model), room_of(axes), Known(tracer.sizes)
        self._kinds: dict[Setup, Hashable] = {}
        self._keeps_whole: dict[Setup, bool] = {}

    def run(self, limits: Limits) -> Outcome:
        """Search among what `limits` admit. A second run knows what the first has traced."""
        start = time.perf_counter()
        found = Outcome(searched=self.tables.searched)
        order = itertools.count()
        heap = [(*key, next(order), setup, step) for key, setup, step in self._screened(limits, found)]
        heapq.heapify(heap)
        solved: set[Setup] = set()
        while heap and len(found.fits) < limits.wanted:
            tier, seconds, _, setup, step = heapq.heappop(heap)
            if found.fits and tier > found.fits[0].candidate.tier:
                break
            if _alike(setup) in solved or seconds > limits.below:
                continue
            now = self._seconds(setup, step)
            if now > seconds * (1 + 1e-9):
                heapq.heappush(heap, (tier, now, next(order), setup, step))
                continue
            miss = self._bound(setup, step, now)
            if miss is not None:
                found.misses.append(miss)
            elif self.known.get(*self._known_as(setup, step)) is None:
                self._trace(setup, step)
                heapq.heappush(heap, (tier, self._seconds(setup, step), next(order), setup, step))
            else:
                judged = self._judge(setup, step, now)
                if isinstance(judged, Fit):
                    found.fits.append(judged)
                    solved.add(_alike(setup))
                else:
                    found.misses.append(judged)
        found.seconds = time.perf_counter() - start
        return found

    # ---- the array stage ---------------------------------------------------------------------------------------

    def _screened(self, limits: Limits, found: Outcome) -> Iterator[tuple[tuple[int, float], Setup, Step]]:
        """All candidates on arrays: what lower bounds refuse is a miss, the rest is to be looked at."""
        for setup, steps in self.axes.legal.items():
            mine = [step for step in steps if limits.admits(setup, step)]
            if not mine:
                continue
            floors, times = self.least(setup, mine)
            fits = np.ones(floors.device.shape, dtype=bool)
            for sizes, room in ((floors.device, self.room.device), (floors.host, self.room.host)):
                fits &= sizes <= room if room is not None else True
            found.refused_by_bounds += int((~fits).sum())
            for at, step in enumerate(mine):
                if fits[:, at].any():
                    yield (max(setup.tier, step.tier), float(times[at])), setup, step
                else:
                    found.misses.append(self._closest(setup, step, float(times[at]), floors.at(at)))

    def least(self, setup: Setup, steps: Sequence[Step]) -> tuple[Floors, Bytes]:
        """Bytes and seconds [steps] that these take at least, as far as traced steps say."""
        figures = [self.known.least(*self._known_as(setup, step)) for step in steps]
        floors = self.tables.least(setup, steps, np.stack([one.peaks for one in figures]))
        seconds = self.tables.seconds(setup, steps, figures).seconds
        return floors, np.broadcast_to(seconds * self._weighed(setup), len(steps))

    def _bound(self, setup: Setup, step: Step, seconds: float) -> Miss | None:
        """A miss where what is known by now refuses every trim."""
        peaks = self.known.least(*self._known_as(setup, step)).peaks[None]
        floors = self.tables.least(setup, [step], peaks)
        lacks = _lacks(floors.device[:, 0], floors.host[:, 0], self.room)
        return None if lacks.min() == 0 else self._closest(setup, step, seconds, floors.at(0))

    def _closest(self, setup: Setup, step: Step, seconds: float, needs: tuple[Bytes, Bytes]) -> Miss:
        lacks = _lacks(*needs, self.room)
        at = int(lacks.argmin())
        place = _place(int(needs[0][at]), self.room)
        candidate = Candidate(setup, step, self.tables.trims[setup][at])
        return Miss(candidate, seconds, place, int(lacks[at]), True)

    def _seconds(self, setup: Setup, step: Step) -> float:
        figures = [self.known.least(*self._known_as(setup, step))]
        return float(np.ravel(self.tables.seconds(setup, [step], figures).seconds)[0]) * self._weighed(setup)

    def _weighed(self, setup: Setup) -> float:
        """What the ranking multiplies seconds by: on one card an engine must be faster by more than the speed model's
        error to be taken. It splits nothing there, and the model does not know all that it does between kernels."""
        alone = self.axes.hardware.ranks == 1 and setup.parallel != "none"
        return 1 + TYPICAL_ERROR if alone else 1.0

    # ---- the exact stage ---------------------------------------------------------------------------------------

    def _kind(self, setup: Setup) -> Hashable:
        if setup not in self._kinds:
            counting = self.tables.counting(setup, self.axes.legal[setup][0])
            self._kinds[setup] = self.tracer.kind(counting)
            self._keeps_whole[setup] = counting.layout.engine.keep_ways == 1
        return self._kinds[setup]

    def _known_as(self, setup: Setup, step: Step) -> tuple[Hashable, Step, bool]:
        """By what a traced step is known: kind, levers, and whether whole gradients wait from one to the next."""
        kind = self._kind(setup)
        return kind, step, self._keeps_whole[setup] and self.tables.several(step)

    def _trace(self, setup: Setup, step: Step) -> None:
        """Trace a step, or one that says enough of it: of a kind first the one that holds least, of those that differ
        in their rows only first the one with the fewest."""
        kind = self._kind(setup)
        chosen = step
        if kind not in self.known.traced:
            chosen = min(self.axes.legal[setup], key=_weight)
        elif not self.known.has_family(*self._known_as(setup, step)):
            chosen = min(self._family(setup, step), key=lambda one: one.micro_batch)
        counting = self.tables.counting(setup, chosen)
        trace, _ = self.tracer.step(counting)
        _, _, accumulated = self._known_as(setup, chosen)
        self.known.add(kind, chosen, figures_of(trace, fixed_of(counting)), accumulated)

    def _family(self, setup: Setup, step: Step) -> list[Step]:
        """The steps that differ in their rows only and bound this one; itself among them."""
        _, _, accumulated = self._known_as(setup, step)
        mine = [one for one in self.axes.legal[setup] if one.micro_batch <= step.micro_batch]
        alike = [one for one in mine if dataclasses.replace(one, micro_batch=step.micro_batch) == step]
        return [one for one in alike if accumulated or not self._known_as(setup, one)[2]]

    def _judge(self, setup: Setup, step: Step, seconds: float) -> Fit | Miss:
        """The first trim from the default on that fits, as little off the default as it can be."""
        rungs = [Candidate(setup, step, trim) for trim in ladder(self.axes, setup)]
        first = self._tried(rungs[0], seconds)
        if isinstance(first, Fit) or len(rungs) == 1:
            return first
        last = self._tried(rungs[-1], seconds)
        if isinstance(last, Miss):
            return min(first, last, key=lambda miss: miss.short)
        for rung in rungs[1:-1]:
            found = self._tried(rung, seconds)
            if isinstance(found, Fit):
                return dataclasses.replace(found, lacks=first.short)
        return dataclasses.replace(last, lacks=first.short)

    def _tried(self, candidate: Candidate, seconds: float) -> Fit | Miss:
        """One candidate, with every value back at its default that need not be off it."""
        lacks, place = self._lacks(candidate)
        if lacks:
            return Miss(candidate, seconds, place, lacks, False)
        for one in dict.fromkeys((self._eased(candidate), candidate)):
            forecast = self.tracer.forecast(self.recipe(one))
            if forecast.fits is not False:
                return Fit(one, seconds, forecast)
        lacks, place = shortfall_of(forecast)
        return Miss(candidate, seconds, place, lacks, False)

    def _eased(self, candidate: Candidate) -> Candidate:
        """The candidate with every value back at its default that need not be off it."""
        trim = candidate.trim
        for _ in range(len(trim.engine)):
            for other in reverted(trim):
                if self._lacks(Candidate(candidate.setup, candidate.step, other))[0] == 0:
                    trim = other
                    break
            else:
                break
        return Candidate(candidate.setup, candidate.step, trim)

    def _lacks(self, candidate: Candidate) -> tuple[int, str]:
        """Bytes that are missing before the allocator rounds anything, and where: 0 where it fits."""
        device, host = self.needs(candidate)
        lacks = _lacks(np.array([device]), np.array([host]), self.room)
        return int(lacks[0]), _place(device, self.room)

    def needs(self, candidate: Candidate) -> tuple[int, int]:
        """Bytes at the peaks of one device and of one node, tensors only: equal to the candidate's forecast."""
        counting = self.tables.counting(candidate.setup, candidate.step, candidate.trim)
        trace, stages = self.tracer.step(counting)
        load = self.model.load(candidate.step.micro_batch)
        device, host = phase_bytes(counting, self.model.buffers, load, trace.pinned)
        batch = np.zeros(len(PHASES), dtype=np.int64)
        for peak in peaks_of(stages):
            batch[PHASES.index(peak.phase)] = sum(peak.pieces.values())
        if self.axes.hardware.gpu is None:
            return 0, int((host + self.axes.hardware.gpus_per_node * batch).max())
        return int((device + batch).max()), int(host.max())

    def recipe(self, candidate: Candidate) -> Recipe:
        """The recipe that a candidate stands for."""
        return with_choice(self.axes, candidate.setup, candidate.step, candidate.trim)


def shortfall_of(forecast: Forecast) -> tuple[int, str]:
    """What a forecast lacks most and where. A replay that fails within the capacity lacks one byte at least."""
    rooms = [room for room in (gpu_room(forecast), host_room(forecast)) if room is not None]
    worst = max(rooms, key=lambda room: room.short, default=None)
    if worst is None or worst.short == 0:
        return 1, "gpu"
    return worst.short, worst.place


def best_misses(misses: Iterable[Miss]) -> list[tuple[Miss, int]]:
    """Of every set-up the miss that lacks least, and how many steps of it were refused; smallest first."""
    found: dict[Setup, list[Miss]] = {}
    for miss in misses:
        found.setdefault(_alike(miss.candidate.setup), []).append(miss)
    closest = [(min(rows, key=_nearness), len(rows)) for rows in found.values()]
    return sorted(closest, key=lambda row: row[0].short)


def _alike(setup: Setup) -> Setup:
    """Set-ups that differ in nothing but whether collectives overlap are one row of the table."""
    return Setup(setup.parallel, setup.offload, setup.offload_to, setup.precision, setup.optimizer)


def _nearness(miss: Miss) -> tuple[int, tuple[int, int, int, int]]:
    """Among set-ups that states alone refuse, the step that holds least."""
    return miss.short, _weight(miss.candidate.step)


def _weight(step: Step) -> tuple[int, int, int, int]:
    """Least bytes first, among steps as engines usually run them: full logits and nothing moved to the host."""
    kept = {"full": 0, "selective": 1}.get(str(step.checkpointing), 2)
    return kept, step.micro_batch, int(step.activation_offload), int(step.loss != "full-logits")


def _lacks(device: Bytes, host: Bytes, room: Room) -> Bytes:
    """Bytes that are missing in the place that lacks most, element by element."""
    found = np.zeros(device.shape, dtype=np.int64)
    for sizes, there in ((device, room.device), (host, room.host)):
        if there is not None:
            found = np.maximum(found, sizes - there)
    return found


def _place(device: int, room: Room) -> str:
    return "gpu" if room.device is not None and device > room.device else "host"
