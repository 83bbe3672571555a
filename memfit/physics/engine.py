"""What an engine adds to a traced step: gathered parameters, buckets, copies and gradients on their way.

Pure functions of numbers. A step is a list of stretches (see `memfit.specs.stretch`); an engine acts between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memfit.physics.memory import share
from memfit.specs.engine_numbers import EngineNumbers

# What is told apart at the peak of a phase, beside what the trace tells apart.
PIECES = ("gathered", "bucket", "copy", "waiting", "norm", "scatter", "output", "kept", "partition")


@dataclass(frozen=True)
class Arrival:
    """A gradient that is ready: elements, bytes, its place among all that learn, and the bytes of it that stay.

    `last` are the elements and bytes of a block's gradients, complete with this one (block-wise engines; None before).
    """

    elements: int
    bytes: int
    offset: int
    kept: int
    last: bool = False
    unit: int = 0


@dataclass(frozen=True)
class Stage:
    """One stretch as the engine sees it: bytes gathered meanwhile, and the gradient that ends it.

    `whole`: bytes of whole gradients that are there (engines that keep them whole). `ends_backward`: nothing arrives
    any more, what waits is reduced now.
    """

    gathered: int = 0
    whole: int = 0
    arrival: Arrival | None = None
    ends_backward: bool = False


@dataclass
class _Flow:
    """Gradients between their making and their place. `now`: bytes of pieces that live on, `moment`: of those that do
    not outlive the stage."""

    engine: EngineNumbers
    learning: int
    partition: int = 0
    accumulated: int = 0
    now: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PIECES, 0))
    moment: dict[str, int] = field(default_factory=dict)
    filled: int = 0
    count: int = 0
    largest: int = 0  # elements of the largest tensor in the bucket
    overall: int = 0  # the same of all that arrived
    ranks: set[int] = field(default_factory=set)
    units: dict[int, list[int]] = field(default_factory=dict)

    def stage(self, stage: Stage) -> dict[str, int]:
        """Bytes of every piece at this stage."""
        self.now["gathered"], self.moment = stage.gathered, {}
        if self.engine.keep_ways == 1:
            self.now["kept"] = stage.whole
        if stage.arrival is not None:
            self._arrive(stage.arrival)
        if stage.ends_backward:
            self._finish_backward()
        seen = {piece: size + self.moment.get(piece, 0) for piece, size in self.now.items()}
        if stage.ends_backward and not self.engine.bucket_stays:
            self.now["bucket"] = 0
        return seen

    def _arrive(self, one: Arrival) -> None:
        engine = self.engine
        if engine.scatter_width:
            self._into_unit(one)
            return
        self.overall = max(self.overall, one.elements)
        if engine.bucket_elements:
            if not engine.bucket_stays:
                self.now["bucket"] = engine.buckets * engine.bucket_elements * engine.bucket_width
            if not engine.reduce_late:
                self._into_bucket(one)

    def _make_partition(self) -> int:
        """Bytes that the buffer for the own share takes from now on and did not before."""
        before = self.now["partition"]
        if self.engine.partition_ways:
            # Gradients of a later micro-batch are summed up from a buffer of their own.
            self.now["partition"] = self.accumulated + self.partition
        return self.now["partition"] - before

    def _into_bucket(self, one: Arrival) -> None:
        """The new gradient exists beside those that wait, the bucket, and the copy that reducing a full one makes."""
        engine = self.engine
        self.moment["waiting"] = one.bytes
        if self.filled + one.elements > engine.bucket_elements:
            self.moment["waiting"] += self.now["waiting"]
            self._flush()
        own = max(1, share(self.learning, engine.ranks))
        self.ranks |= {one.offset // own, (one.offset + max(0, one.elements - 1)) // own}
        self.filled += one.elements
        self.count += 1
        self.largest = max(self.largest, one.elements)
        if one.elements > engine.bucket_elements:
            self.now["waiting"], self.moment["waiting"] = one.bytes, self.moment["waiting"] - one.bytes

    def _flush(self) -> None:
        """Reduce what the bucket holds; the buffer of the own share is made when there is something to put in.

        It comes when the copy has gone, so that beside a new buffer the copy is only what it is larger by.
        Source: deepspeed.runtime.zero.stage_1_and_2: reduce_ipg_grads (average_tensor, then copy_grads_in_partition).
        """
        rule = self.engine.copy_when
        made = self._make_partition() if self.filled else 0
        uneven = self.count > 1 or self.filled % self.engine.ranks > 0
        if self.filled and ((rule == "uneven" and uneven) or (rule == "spans-ranks" and len(self.ranks) > 1)):
            self.moment["copy"] = max(self.moment.get("copy", 0), self.filled * self.engine.bucket_width - made)
        if self.engine.norm_width:
            self.moment["norm"] = max(self.moment.get("norm", 0), self.largest * self.engine.norm_width)
        self.filled = self.count = self.largest = self.now["waiting"] = 0
        self.ranks = set()

    def _into_unit(self, one: Arrival) -> None:
        sums = self.units.setdefault(one.unit, [0, 0, 0])
        for place, size in enumerate((one.elements, one.bytes, one.kept)):
            sums[place] += size
        self.now["waiting"] += one.bytes
        if one.last:
            self._finish_unit(one.unit)

    def _finish_unit(self, unit: int) -> None:
        """The block's gradients are copied into the input of the reduction, then die; its output is what stays."""
        elements, size, kept = self.units.pop(unit)
        self.now["scatter"] = elements * self.engine.scatter_width
        # Later micro-batches add to what is there.
        self.now["kept"] += 0 if self.accumulated else kept
        self.moment["output"] = kept if self.accumulated else 0
        self.now["waiting"] -= size
        self.moment["waiting"] = self.moment.get("waiting", 0) + size

    def _finish_backward(self) -> None:
        engine = self.engine
        for unit in list(self.units):
            self._finish_unit(unit)
        if engine.reduce_late:
            # Gradients go as the bucket takes them, then the copy of it and the own share come: only what the share is
            # larger than one bucketful adds to the whole gradients that were there.
            taken = min(engine.bucket_elements, self.learning) * engine.bucket_width
            self.moment["partition"] = max(0, self.partition - taken)
            self.moment["norm"] = self.overall * engine.norm_width
        elif engine.bucket_elements:
            self.moment["waiting"] = self.now["waiting"]
            self._flush()


def walk(
    stages: Sequence[Stage], engine: EngineNumbers, learning: int, partition: int = 0, accumulated: int = 0
) -> dict[str, list[int]]:
    """Bytes of each of PIECES at each stage. `learning`: elements of all parameters that learn.

    `partition`: bytes of the buffer for the own share of all gradients. `accumulated`: bytes of split gradients that an
    earlier micro-batch left.
    """
    flow = _Flow(engine, learning, partition, accumulated)
    if engine.keep_ways != 1:
        flow.now["partition" if engine.partition_ways else "kept"] = accumulated
    seen = [flow.stage(stage) for stage in stages]
    return {piece: [row[piece] for row in seen] for piece in PIECES}


def peak_places(phases: Sequence[str], totals: Any) -> dict[str, Any]:
    """Where in `totals` each phase has its largest sum (the first of equals). `phases` [stages]; `totals` [..., stages]
    may hold a row for each candidate. Phases in the order in which they begin."""
    names = np.asarray(phases)
    sums = np.asarray(totals)
    found = {}
    for phase in dict.fromkeys(phases):
        own = np.flatnonzero(names == phase)
        found[phase] = own[np.argmax(sums[..., own], axis=-1)]
    return found
