"""The allocator's model against the real one: the same random requests, every figure of its statistics compared."""

from __future__ import annotations

import random

import pytest
import torch

from memfit.physics.allocator import AllocatorOptions, replay
from memfit.units import MIB

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

Row = tuple[str, int, int]


def story(seed: int, length: int = 400) -> list[Row]:
    """Requests of all sizes, freed in any order, at most about 3 GiB alive."""
    rng = random.Random(seed)
    rows: list[Row] = []
    alive: dict[int, int] = {}
    for key in range(length):
        if alive and (rng.random() < 0.45 or sum(alive.values()) > 3000 * MIB):
            freed = rng.choice(list(alive))
            rows.append(("free", freed, alive.pop(freed)))
        else:
            size = rng.choice([rng.randint(1, 4096), rng.randint(1, 2 * MIB), rng.randint(MIB, 300 * MIB)])
            rows.append(("alloc", key, size))
            alive[key] = size
    return rows


def real(rows: list[Row]) -> tuple[int, int, int, int | None]:
    """Peaks allocated and reserved, retries, and where memory was out, from torch.cuda.memory_stats."""
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == 0, "something else holds memory"
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    pointers: dict[int, int] = {}
    oom_at = None
    for position, (kind, key, size) in enumerate(rows):
        if kind == "free":
            torch.cuda.caching_allocator_delete(pointers.pop(key))
            continue
        try:
            pointers[key] = torch.cuda.caching_allocator_alloc(size)
        except torch.cuda.OutOfMemoryError:
            oom_at = position
            break
    stats = torch.cuda.memory_stats()
    for pointer in pointers.values():
        torch.cuda.caching_allocator_delete(pointer)
    torch.cuda.empty_cache()
    figures = (stats["allocated_bytes.all.peak"], stats["reserved_bytes.all.peak"], stats["num_alloc_retries"])
    return (*figures, oom_at)


def forecast(rows: list[Row], options: AllocatorOptions) -> tuple[int, int, int, int | None]:
    result = replay(rows, options)
    return result.peak_allocated, result.peak_reserved, result.retries, result.oom_at


@pytest.mark.parametrize("seed", range(8))
def test_default_segments(seed: int) -> None:
    assert forecast(story(seed), AllocatorOptions()) == real(story(seed))


@pytest.mark.parametrize("seed", range(8))
def test_a_limited_device(seed: int) -> None:
    """torch's own limit on a process counts as the device's size does: what is refused, and what is then given back."""
    rows = story(seed)
    capacity = int(0.9 * replay(rows).peak_reserved) // (2 * MIB) * (2 * MIB)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((capacity + MIB) / total)
    try:
        assert forecast(rows, AllocatorOptions(capacity=capacity)) == real(rows)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("seed", range(8))
def test_expandable_segments(seed: int) -> None:
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    try:
        assert forecast(story(seed), AllocatorOptions(expandable=True)) == real(story(seed))
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")
