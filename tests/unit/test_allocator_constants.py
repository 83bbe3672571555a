"""The constants and rules that physics relies on, read from the headers of the installed torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from memfit.physics import caching

INCLUDE = Path(torch.__file__).parent / "include"


def constants(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"constexpr size_t (\w+) = (\d+);", text)}


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("kMinBlockSize", caching.MIN_BLOCK_SIZE),
        ("kSmallSize", caching.SMALL_SIZE),
        ("kSmallBuffer", caching.SMALL_SEGMENT),
        ("kMinLargeAlloc", caching.MIN_LARGE_ALLOC),
        ("kRoundLarge", caching.ROUND_LARGE),
    ],
)
def test_constants_of_the_device_allocator(name: str, ours: int) -> None:
    assert constants((INCLUDE / "c10/core/AllocatorConfig.h").read_text(encoding="utf-8"))[name] == ours


def test_defaults_of_the_device_allocator() -> None:
    header = (INCLUDE / "c10/core/AllocatorConfig.h").read_text(encoding="utf-8")
    assert f"large_segment_size_{{{caching.LARGE_SEGMENT}}}" in header
    unlimited = "std::numeric_limits<size_t>::max()"
    for name in ("max_split_size_", "pinned_max_round_threshold_", "pinned_max_cached_size_"):
        assert f"{name}{{{unlimited}}}" in header, name
    assert "use_expandable_segments_{false}" in header
    assert "garbage_collection_threshold_{0}" in header


def test_pinned_memory_is_rounded_to_powers_of_two() -> None:
    header = (INCLUDE / "ATen/core/CachingHostAllocator.h").read_text(encoding="utf-8")
    assert "PowerOf2Ceil(size)" in header
