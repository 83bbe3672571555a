"""The allocator against a slow one written another way: free space is searched for anew at every request.

It keeps no blocks, no neighbours and no sorted lists, only where live storages lie; what is free follows from that.
"""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.physics.allocator import AllocatorOptions, Replay, replay
from memfit.specs.events import MemoryEvent
from memfit.units import KIB, MIB

END = 1 << 60
Span = tuple[int, int]


def gaps(start: int, end: int, taken: list[Span]) -> Iterator[Span]:
    """What of [start, end) is in none of the `taken` spans."""
    for a, b in sorted(taken):
        if b <= start or a >= end:
            continue
        if a > start:
            yield start, a
        start = max(start, b)
    if start < end:
        yield start, end


class OutOfMemory(Exception):
    pass


class Naive:
    """Segments as spans of addresses. `live`: pool -> key -> span."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.segments: dict[tuple[bool, int], list[Span]] = {}
        self.live: dict[tuple[bool, int], dict[int, Span]] = {}
        self.where: dict[int, tuple[bool, int]] = {}
        self.next = self.retries = self.peak = 0

    def reserved(self) -> int:
        return sum(b - a for spans in self.segments.values() for a, b in spans)

    def allocated(self) -> int:
        return sum(b - a for spans in self.live.values() for a, b in spans.values())

    def alloc(self, key: int, size: int, stream: int) -> None:
        size = (size + 511) // 512 * 512
        pool = (size <= MIB, stream)
        self.segments.setdefault(pool, [])
        self.live.setdefault(pool, {})
        span = self.cached(pool, size)
        if span is None and not self.grow(pool, size):
            self.retries += 1
            self.release()
            if not self.grow(pool, size):
                raise OutOfMemory
        start, end = span or self.grown
        rest = end - start - size
        if self.split(pool, rest):
            end = start + size
        self.live[pool][key] = (start, end)
        self.where[key] = pool

    def free(self, key: int) -> None:
        del self.live[self.where.pop(key)][key]

    def split(self, pool: tuple[bool, int], rest: int) -> bool:
        return rest >= 512 if pool[0] else rest > MIB

    def cached(self, pool: tuple[bool, int], size: int) -> Span | None:
        taken = list(self.live[pool].values())
        free = [gap for span in self.segments[pool] for gap in gaps(*span, taken)]
        fitting = [(end - start, start, end) for start, end in free if end - start >= size]
        return min(fitting)[1:] if fitting else None

    def grow(self, pool: tuple[bool, int], size: int) -> bool:
        step = 2 * MIB if pool[0] else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if self.reserved() + step > self.capacity:
            return False
        self.grown = (self.next, self.next + step)
        self.segments[pool].append(self.grown)
        self.peak = max(self.peak, self.reserved())
        self.next += step + 512  # never touching, so that two segments are never one gap
        return True

    def release(self) -> None:
        for pool, spans in self.segments.items():
            taken = list(self.live[pool].values())
            self.segments[pool] = [s for s in spans if list(gaps(*s, taken)) != [s]]


class NaiveExpandable(Naive):
    """Every pool a set of pages; `segments` holds one span a page."""

    def split(self, pool: tuple[bool, int], rest: int) -> bool:
        return rest >= 512

    def page(self, pool: tuple[bool, int]) -> int:
        return 2 * MIB if pool[0] else 20 * MIB

    def bare(self, pool: tuple[bool, int]) -> list[Span]:
        return list(gaps(0, END, self.segments[pool]))

    def cached(self, pool: tuple[bool, int], size: int) -> Span | None:
        bare = self.bare(pool)
        free = list(gaps(0, END, [*bare, *self.live[pool].values()]))
        room = {(a, b): b - a + sum(d - c for c, d in bare if c == b) for a, b in free}
        fitting = sorted((span for span in free if span[1] - span[0] >= size), key=lambda s: (s[1] - s[0], s[0]))
        if not fitting:
            return None
        chosen = fitting[0]
        for span in fitting[1:]:
            if room[span] >= room[chosen]:
                break
            chosen = span
        return chosen

    def grow(self, pool: tuple[bool, int], size: int) -> bool:
        page = self.page(pool)
        for start, end in gaps(0, END, list(self.live[pool].values())):
            holes = [(a, b) for a, b in self.bare(pool) if start <= a and b <= end]
            if end - start < size or not holes:
                continue
            for a, b in holes:
                if a >= start + size:
                    break
                pages = [(at, at + page) for at in range(a, min(b, start + size), page)]
                if self.reserved() + page * len(pages) > self.capacity:
                    return False
                self.segments[pool] += pages
                self.peak = max(self.peak, self.reserved())
            ends = [a for a, _ in self.bare(pool) if a >= start + size]
            self.grown = (start, min([end, *ends]))
            return True
        raise AssertionError("the last hole has no end")


def naive(story: list[tuple[str, int, int, int]], expandable: bool, capacity: int) -> Replay:
    memory = (NaiveExpandable if expandable else Naive)(capacity)
    asked: dict[int, int] = {}
    peaks = [0, 0]
    oom_at = None
    for position, (kind, key, size, stream) in enumerate(story):
        if kind == "alloc":
            try:
                memory.alloc(key, size, stream)
            except OutOfMemory:
                oom_at = position
            else:
                asked[key] = size
        elif kind == "free":
            memory.free(key)
            del asked[key]
        else:
            memory.release()
        now = (sum(asked.values()), memory.allocated())
        peaks = [max(pair) for pair in zip(peaks, now, strict=True)]
        if oom_at is not None:
            break
    return Replay(*peaks, memory.peak, memory.allocated(), memory.reserved(), memory.retries, oom_at)


SIZES = st.one_of(
    st.integers(1, 3 * MIB),
    st.integers(MIB, 50 * MIB),
    st.sampled_from([KIB, MIB, MIB + 1, 9 * MIB, 10 * MIB, 11 * MIB + 1, 19 * MIB, 20 * MIB, 25 * MIB, 40 * MIB]),
)


@st.composite
def stories(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    story: list[tuple[str, int, int, int]] = []
    alive: list[int] = []
    for key in range(draw(st.integers(2, 40))):
        action = draw(st.sampled_from("aaaaffffe"))
        if action == "f" and alive:
            story.append(("free", alive.pop(draw(st.integers(0, len(alive) - 1))), 0, 0))
        elif action == "e":
            story.append(("empty_cache", 0, 0, 0))
        else:
            story.append(("alloc", key, draw(SIZES), draw(st.sampled_from([0, 0, 0, 1]))))
            alive.append(key)
    return story


@settings(max_examples=200, deadline=None)
@given(stories(), st.booleans(), st.one_of(st.just(1 << 50), st.integers(10 * MIB, 200 * MIB)))
def test_both_allocators_agree(story: list[tuple[str, int, int, int]], expandable: bool, capacity: int) -> None:
    expected = naive(story, expandable, capacity)
    events = [MemoryEvent(*row) for row in story]  # type: ignore[arg-type]
    assert replay(events, AllocatorOptions(expandable=expandable, capacity=capacity)) == expected


def test_the_slow_one_counts_as_a_person_does() -> None:
    """So that the two cannot agree on something wrong without this failing too."""
    story = [("alloc", 0, 5 * MIB, 0), ("alloc", 1, 30 * MIB, 0), ("free", 0, 0, 0), ("alloc", 2, 100, 0)]
    assert naive(story, False, 1 << 50) == Replay(35 * MIB, 35 * MIB, 52 * MIB, 30 * MIB + 512, 52 * MIB, 0, None)
    assert naive(story, True, 1 << 50) == Replay(35 * MIB, 35 * MIB, 42 * MIB, 30 * MIB + 512, 42 * MIB, 0, None)
