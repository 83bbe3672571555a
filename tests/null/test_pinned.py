"""Pinned host memory is rounded up to powers of two, and what was once held stays."""

from __future__ import annotations

import numpy as np
import pytest

from memfit.physics.pinned import pinned_bytes, pinned_reserved
from memfit.specs.events import MemoryEvent
from memfit.units import GIB, MIB


@pytest.mark.parametrize(
    ("size", "held"),
    [(0, 0), (1, 1), (2, 2), (3, 4), (4096, 4096), (4097, 8192), (GIB, GIB), (GIB + 1, 2 * GIB), (5 * GIB, 8 * GIB)],
)
def test_powers_of_two(size: int, held: int) -> None:
    assert pinned_bytes(size) == held
    assert type(pinned_bytes(size)) is int


def test_arrays_are_the_same_as_numbers() -> None:
    sizes = np.array([0, 1, 5, 4097, 3 * GIB, (1 << 45) + 1], dtype=np.int64)
    assert list(pinned_bytes(sizes)) == [pinned_bytes(int(size)) for size in sizes]
    assert list(pinned_bytes(sizes, round_up_to=5000)) == [0, 1, 8, 8192, 3 * GIB, (1 << 45) + 1]


def test_above_the_threshold_sizes_are_exact() -> None:
    assert pinned_bytes(3 * MIB, round_up_to=2 * MIB) == 3 * MIB
    assert pinned_bytes(3 * MIB, round_up_to=3 * MIB) == 4 * MIB


def test_every_size_class_keeps_its_peak() -> None:
    story = [
        MemoryEvent("alloc", 1, 3 * MIB),  # a block of 4
        MemoryEvent("alloc", 2, 4 * MIB),  # another
        MemoryEvent("free", 1),
        MemoryEvent("alloc", 3, 3 * MIB),  # takes the first again
        MemoryEvent("free", 3),
        MemoryEvent("alloc", 4, 2 * MIB),  # 4 is free, but only its own size serves
        MemoryEvent("free", 4),
        MemoryEvent("free", 2),
        MemoryEvent("alloc", 5, 9 * MIB),
    ]
    assert pinned_reserved(story) == (4 + 4 + 2 + 16) * MIB
