"""What a rank's process finds in its environment, and what it must put there before an engine is imported."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass(frozen=True)
class RankFacts:
    """Which of the run's processes this is, as torchrun tells it."""

    rank: int
    local_rank: int
    ranks: int


def rank_facts() -> RankFacts:
    """RANK, LOCAL_RANK and WORLD_SIZE; a process that nobody launched is rank 0 of 1."""
    return RankFacts(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        ranks=int(os.environ.get("WORLD_SIZE", "1")),
    )


def prepare_environment(cpu: bool) -> None:
    """Set what DeepSpeed and torch's extension builder read when they are imported.

    On CPU ranks DeepSpeed must not look for another accelerator; on GPUs it must not find what an earlier run on the
    CPU left in this process. The environment's own ninja goes first: two ninjas take each other's builds for stale and
    build again at every start.
    """
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif os.environ.get("DS_ACCELERATOR") == "cpu":
        del os.environ["DS_ACCELERATOR"]
    own = str(Path(sys.executable).parent)
    paths = os.environ.get("PATH", "").split(os.pathsep)
    if own not in paths:
        os.environ["PATH"] = os.pathsep.join([own, *paths])


def prepare_allocator(expandable: bool) -> str:
    """Put `levers.allocator` into the environment, where torch reads it when it starts CUDA and ranks inherit it;
    returns the whole setting. Everything else that stands there stays.

    Source: c10/core/AllocatorConfig.h and c10/cuda/CUDAAllocatorConfig.h (torch 2.13): the first takes
    PYTORCH_ALLOC_CONF before the older name, the second the older name first; both must say the same.
    """
    names = [name for name in ALLOCATOR if os.environ.get(name)]
    if not names and not expandable:
        return ""
    for name in names or ALLOCATOR[:1]:
        os.environ[name] = with_segments(os.environ.get(name, ""), expandable)
    return os.environ[(names or ALLOCATOR)[0]]


def with_segments(setting: str, expandable: bool) -> str:
    """An allocator's setting with `expandable_segments` as wanted: `key:value` pairs with commas between."""
    key = "expandable_segments"
    others = [pair for pair in setting.split(",") if pair.strip() and pair.partition(":")[0].strip() != key]
    had = len(others) < len([pair for pair in setting.split(",") if pair.strip()])
    if expandable or had:
        others.append(f"{key}:{expandable}")
    return ",".join(others)


def without_peer_access() -> None:
    """NCCL must not try to reach another GPU's memory directly: cards without that freeze in the first exchange."""
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
        os.environ.setdefault(name, "1")
