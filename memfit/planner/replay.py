"""Replay two training steps through the model of the CUDA caching allocator: reserved is not a share of allocated."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field

from memfit.catalog.context import outside
from memfit.physics.allocator import replay, smallest_reserved
from memfit.physics.caching import AllocatorOptions
from memfit.planner.counting import Counting
from memfit.planner.engine_stages import Stages
from memfit.specs.ledger import Term
from memfit.specs.plan import Forecast, Reserved
from memfit.specs.trace import StepTrace

# kind, key, bytes: a row that memfit.physics.allocator reads. Plain, because a step has a hundred thousand of them.
_Row = tuple[str, int, int]

SOURCE = "replay of two steps (states, traced micro-batches, engine, optimizer) through memfit.physics.allocator"


def replay_steps(forecast: Forecast, counting: Counting, trace: StepTrace, stages: Stages) -> Reserved:
    """Weights are loaded, then two optimizer steps of one traced micro-batch each run on the same allocator.

    The second step is the usual one: optimizer states exist while activations come and go. A run that is too large for
    the card is replayed once more at what the card has left: the allocator empties its cache and tries again.
    """
    hardware = forecast.hardware
    expandable = forecast.recipe.levers.allocator == "expandable"
    events = list(_Story(forecast, counting, trace, stages).events())
    result = replay(events, AllocatorOptions(expandable=expandable))
    beside = outside(hardware)
    free = None if hardware.gpu is None else hardware.gpu.capacity_bytes - sum(size for _, size, _, _ in beside)
    source = SOURCE + (", expandable segments" if expandable else "")
    unlimited, smallest, runs = result.peak_reserved, None, True
    if free is not None and result.peak_reserved > free:
        options = AllocatorOptions(expandable=expandable, capacity=max(0, free))
        capped = replay(events, options)
        runs = capped.oom_at is None
        if runs:
            result = capped
            smallest = smallest_reserved(events, options)
            source += f", at the {free:,} B that the card has left: the cache was emptied {capped.retries} times"
    return Reserved(
        requested=result.peak_requested,
        peak_allocated=result.peak_allocated,
        peak_reserved=result.peak_reserved,
        outside=tuple((name, size, why) for name, size, why, _ in beside),
        source=source,
        unlimited=unlimited,
        smallest=smallest,
        runs=runs,
    )


@dataclass
class _Piece:
    """Storages of one kind of engine memory, oldest first: what is let go is what came first."""

    storages: deque[tuple[int, int]] = field(default_factory=deque)
    size: int = 0


class _Story:
    """The events of loading and two optimizer steps, as one rank's allocator sees them."""

    def __init__(self, forecast: Forecast, counting: Counting, trace: StepTrace, stages: Stages) -> None:
        self.terms, self.counting, self.trace, self.stages = forecast.ledger.terms, counting, trace, stages
        self.whole = counting.layout.engine.keep_ways == 1
        self.key = 0
        self.pieces: dict[str, _Piece] = {}
        self.away: dict[int, int] = {}  # storages that are let go for the step

    def events(self) -> Iterator[_Row]:
        yield from self._states()
        yield from self._moment([term for term in self.terms if _is_moment(term, "load")])
        for step in range(2):
            alive = yield from self._micro_batch()
            if step == 0:
                for size in self._sizes("optimizer"):
                    yield self._alloc(size)
            yield from self._end_of_backward()
            # Whole gradients go before the step where the engine has a share of its own, else after it
            # (zero_grad(set_to_none=True)).
            early = self.counting.layout.gradients_end == "backward"
            for key in alive if early else ():
                yield "free", key, 0
            for key in self.away:
                yield "free", key, 0
            yield from self._moment([term for term in self.terms if _is_moment(term, "step")])
            for key, size in self.away.items():
                yield "alloc", key, size
            for key in () if early else alive:
                yield "free", key, 0
            for piece in list(self.pieces):
                yield from self._set(piece, 0)

    def _end_of_backward(self) -> Iterator[_Row]:
        """Of the engine's memory only the own share of the gradients outlives backward."""
        for piece in list(self.pieces):
            if piece not in ("kept", "partition"):
                yield from self._set(piece, 0)

    def _alloc(self, size: int) -> _Row:
        self.key += 1
        return "alloc", self.key, size

    def _sizes(self, kind: str) -> list[int]:
        sizes = [size for group in self.counting.groups for size in self.counting.tensor_sizes(group, kind)]
        return [size for size in sizes if size]

    def _states(self) -> Iterator[_Row]:
        """What lives from loading on: tensors of weights and master copies one by one, everything else by its term."""
        for kind in ("weights", "master"):
            for size in self._sizes(kind):
                yield self._alloc(size)
        for term in self.terms:
            pieces = term.id.split(".")
            one_by_one = (pieces[1] if pieces[0] in ("adapter", "saved") else pieces[0]) in ("weights", "master")
            if term.place == "gpu" and "load" in term.alive and len(term.alive) > 1 and not one_by_one:
                row = self._alloc(term.bytes)
                if "step" not in term.alive:
                    self.away[self.key] = term.bytes
                yield row

    def _moment(self, terms: list[Term]) -> Iterator[_Row]:
        """Terms that live together for a moment."""
        keys = []
        for term in terms:
            if term.bytes:
                yield self._alloc(term.bytes)
                keys.append(self.key)
        for key in keys:
            yield "free", key, 0

    def _micro_batch(self) -> Generator[_Row, None, list[int]]:
        """The trace's own events with the engine's between them; returns the keys of what is alive at the end."""
        starts = {row.begins: at for at, row in enumerate(self.stages.stretches)}
        pieces = [(piece, sizes) for piece, sizes in self.stages.pieces.items() if piece != "kept" or not self.whole]
        keys: dict[int, int] = {}
        for at, (kind, storage, size, *_) in enumerate(self.trace.events):
            if at in starts:
                for piece, sizes in pieces:
                    yield from self._set(piece, sizes[starts[at]])
            if kind == "alloc":
                self.key += 1
                keys[storage] = self.key
                yield "alloc", self.key, size
            elif kind == "free" and storage in keys:
                yield "free", keys.pop(storage), 0
            elif kind == "gradient" and not self.whole and storage in keys:
                # From here on the engine counts it: waiting, in a bucket, or as a share.
                yield "free", keys.pop(storage), 0
        return list(keys.values())

    def _set(self, name: str, size: int) -> Iterable[_Row]:
        """Bring one kind of engine memory to `size` bytes."""
        piece = self.pieces.get(name)
        if piece is None:
            piece = self.pieces[name] = _Piece()
        return () if piece.size == size else self._moved(piece, size)

    def _moved(self, piece: _Piece, size: int) -> Iterator[_Row]:
        while piece.size > size:
            key, oldest = piece.storages.popleft()
            piece.size -= oldest
            yield "free", key, 0
        if piece.size < size:
            row = self._alloc(size - piece.size)
            piece.storages.append(row[1:])
            piece.size = size
            yield row


def _is_moment(term: Term, phase: str) -> bool:
    """Whether a term is a temporary of one phase: gradients in the step are there from backward on."""
    return (
        term.alive == (phase,)
        and term.place == "gpu"
        and not {"gradients", "gradient_copies"} & set(term.id.split("."))
    )
