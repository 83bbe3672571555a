"""Allocations and frees of one device in the order in which they happen: what an allocator replays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EventKind = Literal["alloc", "free", "empty_cache"]


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """One storage comes or goes.

    `key` names the storage; it may be used again once freed. `bytes` is the size that was asked for: exact, not rounded
    (a "free" need not repeat it). `stream` is the CUDA stream that allocates: blocks of one stream serve no other.
    "empty_cache" gives cached memory back to the device; it needs no key.
    """

    kind: EventKind
    key: int = 0
    bytes: int = 0
    stream: int = 0
