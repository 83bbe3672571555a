"""Split parameters that are whole around their use: what is gathered while each module runs.

Two schedules, as functions of numbers: module by module with a look ahead, and block by block. Parameters are numbers
from 0; `elements[p]` and `bytes_of[p]` say how large they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from memfit.specs.engine_numbers import EngineNumbers


@dataclass
class _Gathered:
    """Whole parameters and collectives under way, in bytes, and elements as the engine counts them."""

    elements: Sequence[int]
    bytes_of: Sequence[int]
    whole: set[int] = field(default_factory=set)
    waited: set[int] = field(default_factory=set)
    handle_of: dict[int, int] = field(default_factory=dict)
    handles: dict[int, tuple[int, set[int]]] = field(default_factory=dict)
    made: int = 0
    available: int = 0
    held: int = 0
    peak: int = 0

    def fetch(self, wanted: Sequence[int]) -> None:
        """Start one collective for what is not there. Several parameters share a flat buffer, a single one needs none.

        Source: deepspeed.runtime.zero.partition_parameters:Init (_all_gather_coalesced, _all_gather_sequential).
        """
        missing = [p for p in wanted if p not in self.whole]
        if not missing:
            return
        size = sum(self.bytes_of[p] for p in missing)
        self.whole.update(missing)
        self.available += sum(self.elements[p] for p in missing)
        self.held += size
        if len(missing) == 1:
            self.waited.add(missing[0])
        else:
            self.made += 1
            self.handles[self.made] = (size, set(missing))
            self.handle_of.update(dict.fromkeys(missing, self.made))
        self.peak = max(self.peak, self.held)

    def wait(self, wanted: Sequence[int]) -> None:
        """Waiting for one parameter copies all of its collective out of the flat buffer; the buffer goes when each of
        them was waited for by a module of its own.

        Source: deepspeed.runtime.zero.partition_parameters:AllGatherCoalescedHandle.wait, whose handle the registry of
        PartitionedParameterCoordinator keeps for every parameter until its module comes.
        """
        for p in wanted:
            number = self.handle_of.pop(p, None)
            if number is None:
                continue
            size, left = self.handles[number]
            if p not in self.waited:
                self.waited |= left
                self.held += size
                self.peak = max(self.peak, self.held)
            left.discard(p)
            if not left:
                self.held -= size
                del self.handles[number]

    def release(self, p: int) -> None:
        if p in self.whole and p in self.waited:
            self.whole.discard(p)
            self.waited.discard(p)
            self.available -= self.elements[p]
            self.held -= self.bytes_of[p]


def by_module(
    visits: Sequence[Sequence[int]], elements: Sequence[int], bytes_of: Sequence[int], engine: EngineNumbers
) -> list[tuple[int, int]]:
    """Bytes gathered while each visit's module runs, and the most while it waits for them before; parameters that are
    never split left out.

    `visits` are the parameters of each module in the order in which modules run through forward and backward, in a step
    after the first (the engine knows the order then). Source: deepspeed.runtime.zero.partitioned_param_coordinator:
    PartitionedParameterCoordinator (fetch_sub_module, release_sub_module, __params_to_release).
    """
    split = [[p for p in visit if elements[p] > engine.persistent_elements] for visit in visits]
    queue = [(number, p) for number, visit in enumerate(split) for p in visit]
    ends = _ends(split)
    # The engine counts what is never split on its way to the next use, too.
    travelled = [0]
    for visit in visits:
        travelled.append(travelled[-1] + sum(elements[p] for p in visit))
    uses = _uses(queue)
    state = _Gathered(elements, bytes_of)
    pointer, found = 0, []
    for number, visit in enumerate(split):
        state.peak = state.held
        state.fetch(visit)
        state.wait(visit)
        waited = state.peak
        pointer = _look_ahead(state, queue, max(pointer, ends[number]), engine)
        found.append((state.held, waited))
        for p in visit:
            later = next((place for place in uses[p] if queue[place][0] > number), None)
            near = later is not None and travelled[queue[later][0]] - travelled[number + 1] < engine.reuse_elements
            if later is None or not (near or later < pointer):
                state.release(p)
    return found


def _look_ahead(state: _Gathered, queue: Sequence[tuple[int, int]], pointer: int, engine: EngineNumbers) -> int:
    """Start the collective for what comes next; returns how far the queue has been read."""
    room = min(engine.live_elements - state.available, engine.prefetch_elements)
    wanted: dict[int, None] = {}
    taken = 0
    while pointer < len(queue) and taken < room:
        p = queue[pointer][1]
        pointer += 1
        if p not in state.whole and p not in wanted:
            wanted[p] = None
            taken += state.elements[p]
    state.fetch(list(wanted))
    return pointer


def _ends(split: Sequence[Sequence[int]]) -> list[int]:
    ends, count = [], 0
    for visit in split:
        count += len(visit)
        ends.append(count)
    return ends


def _uses(queue: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    uses: dict[int, list[int]] = {}
    for place, (_, p) in enumerate(queue):
        uses.setdefault(p, []).append(place)
    return uses


ROOT = -1


@dataclass(frozen=True)
class BlockVisit:
    """A stretch under a block-wise engine: `unit` is a block's number or ROOT; `backward` and `loss` say when."""

    unit: int
    backward: bool
    loss: bool = False


def by_block(visits: Sequence[BlockVisit], size_of: Sequence[int], root: int, engine: EngineNumbers) -> list[int]:
    """Bytes gathered at each visit. `size_of`: whole bytes of each block, `root`: of everything outside blocks.

    Forward: the block that runs and the collective's buffer of the last one, which is let go by the next. Backward: the
    block that runs and the buffer of the one before it, which is fetched already. The root is whole from the beginning
    of forward to the end of backward, and between them when it stays.
    Source: torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.wait_for_unshard and pre_backward.
    """
    order = list(dict.fromkeys(visit.unit for visit in visits if visit.unit != ROOT and not visit.backward))
    before = {unit: earlier for earlier, unit in pairwise(order)}
    found, buffer = [], root if engine.collective_copy else 0
    left: set[int] = set()
    last = ROOT
    for visit in visits:
        held = root if not visit.loss or engine.root_stays else 0
        if visit.unit != ROOT:
            held += size_of[visit.unit]
            last = visit.unit
        if visit.backward and visit.unit != ROOT:
            ahead = before.get(visit.unit)
            left.add(visit.unit)
            held += size_of[ahead] if ahead is not None and ahead not in left and engine.collective_copy else 0
        elif not visit.backward and not visit.loss and engine.collective_copy:
            buffer = size_of[last] if last != ROOT else buffer
            held += buffer
        found.append(held)
    return found
