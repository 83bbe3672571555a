"""The caching allocator's rules, one hand-computed sequence each, and what must hold for every sequence."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.physics.allocator import AllocatorOptions, Replay, replay, smallest_reserved
from memfit.physics.caching import Block, CachingAllocator, ExpandableAllocator
from memfit.specs.events import MemoryEvent
from memfit.specs.trace import Event as Step
from memfit.units import KIB, MIB

EXPANDABLE = AllocatorOptions(expandable=True)


def events(text: str) -> list[MemoryEvent]:
    """`+a25` allocates 25 MiB as a, `+a25+1` a byte more, `@1` on stream 1; `-a` frees a, `!` empties the cache."""
    found = []
    for word in text.split():
        word, _, stream = word.partition("@")
        if word == "!":
            found.append(MemoryEvent("empty_cache"))
        elif word[0] == "-":
            found.append(MemoryEvent("free", ord(word[1])))
        else:
            mib, _, extra = word[2:].partition("+")
            size = int(mib) * MIB + int(extra or 0)
            found.append(MemoryEvent("alloc", ord(word[1]), size, int(stream or 0)))
    return found


def after(text: str, **options: Any) -> Replay:
    return replay(events(text), AllocatorOptions(**options))


def mib(text: str, **options: Any) -> tuple[float, float]:
    """Peaks allocated and reserved in MiB."""
    result = after(text, **options)
    return result.peak_allocated / MIB, result.peak_reserved / MIB


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "block"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)])
def test_blocks_round_to_512_bytes(asked: int, block: int) -> None:
    assert AllocatorOptions().rounded(asked) == block


@pytest.mark.parametrize(
    ("divisions", "asked", "block"),
    [
        (4, 5000, 5120),
        (4, 5121, 6144),
        (4, 8192, 8192),
        (8, 5000, 5120),
        (8, 4096, 4096),
        (8, 3000, 3072),
        (1, 513, 1024),
    ],
)
def test_power_of_two_divisions(divisions: int, asked: int, block: int) -> None:
    # Between 4096 and 8192 four divisions stand 1024 apart, eight 512; below 512 x divisions the option does nothing.
    assert AllocatorOptions(roundup_power2_divisions=divisions).rounded(asked) == block


@pytest.mark.parametrize(
    ("asked", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (1000 * MIB, 1000 * MIB),
    ],
)
def test_segments(asked: int, segment: int) -> None:
    assert AllocatorOptions().segment_size(asked) == segment
    assert replay([("alloc", 0, asked)]).peak_reserved == segment


def test_nothing_is_no_allocation() -> None:
    assert replay([("alloc", 0, 0), ("free", 0, 0)]) == Replay(0, 0, 0, 0, 0, 0, None)
    assert replay([]).fragmentation == 0


def test_exact_bytes_and_blocks_are_told_apart() -> None:
    result = replay([("alloc", 0, 100), ("alloc", 1, 700)])
    assert (result.peak_requested, result.peak_allocated, result.peak_reserved) == (800, 512 + 1024, 2 * MIB)
    assert result.fragmentation == 1 - 1536 / (2 * MIB)


# --- splitting, joining, choosing ------------------------------------------------------------------------------------


def test_a_large_rest_is_kept_apart_only_above_1_mib() -> None:
    # 11 MiB and a byte take a segment of 12; the rest is below 1 MiB and stays with the block.
    assert mib("+a11+1") == (12, 12)
    # 10 MiB and a byte leave 2 MiB less 512 B, which serves another request.
    assert after("+a10+1").peak_allocated == 10 * MIB + 512
    assert mib("+a10+1 +b1+1")[1] == 12
    # exactly 1 MiB is not enough
    assert mib("+a19") == (20, 20)


def test_a_small_rest_is_kept_apart_from_512_bytes_on() -> None:
    # One segment of 2 MiB holds 4096 blocks of 512 B, and not one more.
    full = [("alloc", key, 1) for key in range(4096)]
    assert replay(full).peak_reserved == 2 * MIB
    assert replay([*full, ("alloc", 4096, 1)]).peak_reserved == 4 * MIB


def test_medium_requests_share_a_segment_of_20_mib() -> None:
    assert mib("+a5 +b5 +c5 +d5") == (20, 20)
    assert mib("+a5 +b5 +c5 +d5 +e5") == (25, 40)
    assert mib("+a9 +b9 +c9") == (27, 40)


def test_the_smallest_block_that_fits_is_taken() -> None:
    # First fit would cut the 30 for c and then have no 30 left.
    assert mib("+a30 +b20 -a -b +c20 +d30") == (50, 50)


def test_of_equal_blocks_the_lowest_address_is_taken() -> None:
    allocator = CachingAllocator(AllocatorOptions())
    blocks = [allocator.malloc(20 * MIB) for _ in range(3)]
    for block in (blocks[2], blocks[0], blocks[1]):
        assert block is not None
        allocator.free(block)
    again = [allocator.malloc(20 * MIB) for _ in range(3)]
    assert [block.address // MIB for block in again if block] == [0, 20, 40]


def test_free_neighbours_join() -> None:
    assert mib("+a5 +b5 +c5 +d5 -b -d -a -c +e20") == (20, 20)
    # b between them keeps 5 and 10 apart, so 12 needs a segment of its own
    assert mib("+a5 +b5 +c5 +d5 -d -a -c +e12") == (20, 32)


def test_small_and_large_blocks_live_apart() -> None:
    assert mib("+a20 -a +b1") == (20, 22)
    assert replay([("alloc", 0, 100 * KIB), ("alloc", 1, 2 * MIB)]).peak_reserved == 22 * MIB


def test_a_stream_does_not_use_another_streams_blocks() -> None:
    assert mib("+a30 -a +b30") == (30, 30)
    assert mib("+a30 -a +b30@1") == (30, 60)


def test_the_cache_stays_until_it_is_emptied() -> None:
    assert after("+a30 -a").reserved_at_end == 30 * MIB
    assert after("+a30 -a !").reserved_at_end == 0
    # a segment with one live block stays whole
    assert after("+a5 +b5 -a !").reserved_at_end == 20 * MIB


# --- a full device ---------------------------------------------------------------------------------------------------


def test_a_full_device_empties_the_cache_and_asks_again() -> None:
    result = after("+a20 -a +b30", capacity=40 * MIB)
    assert (result.peak_reserved, result.retries, result.oom_at) == (30 * MIB, 1, None)


def test_out_of_memory_when_what_is_cached_is_cut() -> None:
    # a holds 2 of a segment of 20, which cannot be given back: 20 + 30 do not go into 40.
    result = after("+a2 +b30 +c30", capacity=40 * MIB)
    assert (result.oom_at, result.retries, result.peak_reserved) == (1, 1, 20 * MIB)
    assert after("+a2 +b30", capacity=50 * MIB).oom_at is None


def test_the_smallest_reserved() -> None:
    story = events("+a20 -a +b30 -b +c40")
    assert replay(story).peak_reserved == 90 * MIB
    assert smallest_reserved(story) == 40 * MIB
    assert smallest_reserved(events("+a2 +b30")) == 50 * MIB
    assert smallest_reserved([]) == 0
    # the capacity of the options plays no part
    assert smallest_reserved(story, AllocatorOptions(capacity=1)) == 40 * MIB


def test_more_memory_can_be_worse() -> None:
    """Success is not monotone: what is still cached may be cut for a small request, and then serves no large one.

    With 44 MiB, b empties the cache of a's 20; c gets 14 of its own and d's 30 follow once b's 26 are given back. With
    46 or 48, a's 20 stay, c cuts them, and 20 + 30 are too many.
    """
    story = events("+a20 -a +b26 +c14 -b +d30")
    passed = {c: replay(story, AllocatorOptions(capacity=c * MIB)).oom_at is None for c in (42, 44, 46, 48, 50, 76)}
    assert passed == {42: False, 44: True, 46: False, 48: False, 50: True, 76: True}
    assert smallest_reserved(story) == 50 * MIB


# --- options ---------------------------------------------------------------------------------------------------------


def test_max_split_size_keeps_large_blocks_whole() -> None:
    limit = 32 * MIB
    assert mib("+a100 -a +b12") == (100, 100)
    assert mib("+a100 -a +b12", max_split_size=limit) == (100, 112)
    # a request nearly as large gets the whole block: 100 < 90 + 20
    assert after("+a100 -a +b90", max_split_size=limit).allocated_at_end == 100 * MIB
    assert mib("+a100 -a +b80", max_split_size=limit) == (100, 180)
    # at the limit itself a block is whole already
    assert mib("+a32 -a +b12", max_split_size=limit) == (32, 44)


def test_max_split_size_frees_just_enough_when_full() -> None:
    limit = 32 * MIB
    # d takes the cached 60, which is less than 50 + 20: nothing is freed
    taken = after("+a40 +b60 +c20 -a -b -c +d50", max_split_size=limit, capacity=120 * MIB)
    assert (taken.allocated_at_end, taken.reserved_at_end, taken.retries) == (60 * MIB, 120 * MIB, 0)
    # d may not have the 60 (36 + 20 is less), so these are given back, and the 20 stay
    one = after("+a60 +c20 -a -c +d36", max_split_size=limit, capacity=90 * MIB)
    assert (one.reserved_at_end, one.retries) == (56 * MIB, 0)
    # no single block is large enough for 100: the largest go until there is room, 36 stay
    several = after("+a40 +b60 +c36 -a -b -c +d100", max_split_size=limit, capacity=136 * MIB)
    assert (several.reserved_at_end, several.retries) == (136 * MIB, 0)
    # what may go is less than the request: the rest of the cache goes too, although 20 + 70 would do
    everything = after("+a40 +c20 -a -c +d70", max_split_size=limit, capacity=90 * MIB)
    assert (everything.reserved_at_end, everything.retries) == (70 * MIB, 1)
    # blocks of expandable segments are not given back this way
    pages = after("+a40 +b2 +c40 +e2 -a -c +d50", max_split_size=limit, capacity=100 * MIB, expandable=True)
    assert (pages.reserved_at_end, pages.retries) == (80 * MIB, 1)


def test_large_segments_of_another_size() -> None:
    assert mib("+a2", large_segment_size=64 * MIB) == (2, 64)
    with pytest.raises(ValueError, match="large_segment_size"):
        AllocatorOptions(large_segment_size=MIB)
    with pytest.raises(ValueError, match="divisions"):
        AllocatorOptions(roundup_power2_divisions=3)


# --- expandable segments ---------------------------------------------------------------------------------------------


def test_expandable_segments_grow_by_pages() -> None:
    assert mib("+a1", expandable=True) == (1, 2)
    assert mib("+a25", expandable=True) == (25, 40)
    assert mib("+a25 +b15", expandable=True) == (40, 40)
    # every rest from 512 B on is kept apart, in the large pool too
    assert after("+a11+1", expandable=True).peak_allocated == 11 * MIB + 512


def test_an_expandable_segment_grows_from_its_free_end() -> None:
    # c finds 25 free at the start, too little, and 1 free at the end, which 25 more make 26: two pages
    assert mib("+a25 +b14 -a +c26", expandable=True) == (40, 80)
    # the whole free run is used where it grows in place: 40 and one page, where default segments need 26 + 46
    assert mib("+a25 -a +b45", expandable=True) == (45, 60)
    assert mib("+a25 -a +b45") == (46, 72)


def test_the_growing_end_is_taken_last() -> None:
    # a's 30 and the end's 25 are free; best fit alone would take the end for 24.
    allocator = ExpandableAllocator(EXPANDABLE)
    first, guard = allocator.malloc(30 * MIB), allocator.malloc(5 * MIB)
    assert first is not None
    assert guard is not None
    allocator.free(first)
    assert guard.address == 30 * MIB
    inner = allocator.malloc(4 * MIB)  # the end has 5 MiB mapped and room without limit
    assert inner is not None
    assert inner.address == 0


def test_of_equal_runs_the_lowest_address_is_taken() -> None:
    allocator = ExpandableAllocator(EXPANDABLE)
    blocks = [allocator.malloc(4 * MIB) for _ in range(5)]
    for index in (2, 0):
        block = blocks[index]
        assert block is not None
        allocator.free(block)
    assert [block.address // MIB for block in (allocator.malloc(4 * MIB), allocator.malloc(4 * MIB)) if block] == [0, 8]


def test_a_run_over_a_gap_maps_the_gap_and_the_end() -> None:
    # b's second page is taken away; with c gone too, d runs from b's start over that page and c's place to the end:
    # 10 free, 20 bare, 20 free, and one more page.
    result = after("+a10 +b30 +c10 -b ! -c +d60", expandable=True)
    assert (result.allocated_at_end, result.reserved_at_end) == (70 * MIB, 80 * MIB)


def test_expandable_segments_give_back_whole_pages() -> None:
    # 40 mapped; b lies in the second page, so only the first goes
    assert after("+a25 +b5 -a !", expandable=True).reserved_at_end == 20 * MIB
    assert after("+a25 +b5 -a -b !", expandable=True).reserved_at_end == 0
    # the gap is filled first: c grows into the pages that were taken away
    assert after("+a25 +b5 -a ! +c25", expandable=True).reserved_at_end == 40 * MIB


def test_an_expandable_segment_moves_pages_when_full() -> None:
    # a's page stands in front of b and is too short for c; given back, it is mapped behind b
    result = after("+a20 +b2 -a +c35", expandable=True, capacity=40 * MIB)
    assert (result.oom_at, result.retries, result.reserved_at_end) == (None, 1, 40 * MIB)
    assert after("+a20 +b2 -a +c35", expandable=True).peak_reserved == 60 * MIB


def test_growing_lengths_fragment_default_segments_more() -> None:
    lengths = [300, 340, 390, 440, 500, 570, 650]
    story: list[MemoryEvent] = []
    for step, length in enumerate(lengths):
        keys = range(100 * step, 100 * step + 12)
        story += [MemoryEvent("alloc", key, length * 64 * KIB * (1 + key % 3)) for key in keys]
        story += [MemoryEvent("free", key) for key in keys]
    default, expandable = replay(story), replay(story, EXPANDABLE)
    assert default.peak_requested == expandable.peak_requested
    assert expandable.peak_reserved - expandable.peak_allocated <= 20 * MIB
    assert default.peak_reserved > 1.2 * expandable.peak_reserved
    assert smallest_reserved(story) < default.peak_reserved


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([("alloc", 1, 5), ("alloc", 1, 5)], "event 1: storage 1 is alive already"),
        ([("alloc", 1, 5), ("free", 2, 0)], "event 1: storage 2 is freed but not alive"),
        ([("alloc", 1, -5)], "event 0: storage 1 has -5 bytes"),
        ([("grow", 1, 5)], "event 0: unknown kind 'grow'"),
    ],
)
def test_events_that_contradict_themselves(rows: list[tuple[str, int, int]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        replay(rows)


def test_rows_and_events_are_the_same() -> None:
    story = events("+a5 +b30 -a +c9 !")
    rows = [(event.kind, event.key, event.bytes) for event in story]
    assert replay(rows) == replay(story)


def test_a_trace_is_replayed_as_it_is() -> None:
    trace = [
        Step("phase", -1, 0, "forward", "", ""),
        Step("alloc", 1, 5 * MIB, "forward", "lm.layers.0", "mm"),
        Step("gradient", 1, 0, "forward", "lm.layers.0.weight", ""),
        Step("free", 1, 5 * MIB, "backward", "", ""),
    ]
    assert replay(trace) == replay([("alloc", 1, 5 * MIB), ("free", 1, 0)])


# --- every sequence --------------------------------------------------------------------------------------------------

SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(4 * KIB, 3 * MIB),
    st.integers(MIB, 60 * MIB),
    st.sampled_from([MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 11 * MIB + 1, 19 * MIB, 20 * MIB]),
)


@st.composite
def sequences(draw: st.DrawFn) -> list[MemoryEvent]:
    """Allocations, frees in any order, now and then another stream or an emptied cache."""
    story: list[MemoryEvent] = []
    alive: list[int] = []
    for key in range(draw(st.integers(1, 24))):
        action = draw(st.sampled_from(["alloc", "alloc", "alloc", "free", "free", "empty_cache"]))
        if action == "free" and alive:
            story.append(MemoryEvent("free", alive.pop(draw(st.integers(0, len(alive) - 1)))))
        elif action == "empty_cache":
            story.append(MemoryEvent("empty_cache"))
        else:
            story.append(MemoryEvent("alloc", key, draw(SIZES), draw(st.sampled_from([0, 0, 0, 1]))))
            alive.append(key)
    return story


@settings(max_examples=80, deadline=None)
@given(sequences(), st.booleans())
def test_figures_are_in_order(story: list[MemoryEvent], expandable: bool) -> None:
    options = AllocatorOptions(expandable=expandable)
    result = replay(story, options)
    assert result.peak_requested <= result.peak_allocated <= result.peak_reserved
    assert result.allocated_at_end <= result.reserved_at_end <= result.peak_reserved
    assert (result.retries, result.oom_at) == (0, None)
    alive = {event.key for event in story if event.kind == "alloc"} - {e.key for e in story if e.kind == "free"}
    emptied = replay([*story, *(MemoryEvent("free", key) for key in alive), MemoryEvent("empty_cache")], options)
    assert (emptied.allocated_at_end, emptied.reserved_at_end) == (0, 0)


@settings(max_examples=50, deadline=None)
@given(sequences(), st.booleans())
def test_the_smallest_reserved_is_an_edge(story: list[MemoryEvent], expandable: bool) -> None:
    options = AllocatorOptions(expandable=expandable)
    unlimited, smallest = replay(story, options), smallest_reserved(story, options)
    assert unlimited.peak_requested <= smallest <= unlimited.peak_reserved
    passes = replay(story, dataclasses.replace(options, capacity=smallest))
    assert passes.oom_at is None
    assert passes.peak_reserved <= smallest
    if smallest:
        assert replay(story, dataclasses.replace(options, capacity=smallest - 2 * MIB)).oom_at is not None
    # from the unlimited peak on, more memory changes nothing
    for more in (0, 2 * MIB, 500 * MIB):
        assert replay(story, dataclasses.replace(options, capacity=unlimited.peak_reserved + more)) == unlimited


@settings(max_examples=80, deadline=None)
@given(sequences(), st.booleans())
def test_live_blocks_never_overlap(story: list[MemoryEvent], expandable: bool) -> None:
    options = AllocatorOptions(expandable=expandable)
    allocator = ExpandableAllocator(options) if expandable else CachingAllocator(options)
    live: dict[int, Block] = {}
    for event in story:
        if event.kind == "alloc":
            block = allocator.malloc(options.rounded(event.bytes), event.stream)
            assert block is not None
            assert block.size >= event.bytes
            live[event.key] = block
        elif event.kind == "free":
            allocator.free(live.pop(event.key))
        else:
            allocator.empty_cache()
        cached = [block for pool in allocator.pools() for _, _, block in pool.free]
        assert sum(b.size for b in cached) + sum(b.size for b in live.values()) == allocator.reserved
        for pool in allocator.pools():
            spans = sorted((b.address, b.size) for b in (*live.values(), *cached) if b.pool is pool)
            assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(spans))
            assert pool.free == sorted(pool.free, key=lambda row: row[:2])
