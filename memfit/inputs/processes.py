"""What a rank's process finds in its environment, and what it must put there before an engine is imported."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path


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

    On CPU ranks DeepSpeed must not look for another accelerator. The environment's own ninja goes first: two ninjas
    take each other's builds for stale and build again at every start.
    """
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    own = str(Path(sys.executable).parent)
    paths = os.environ.get("PATH", "").split(os.pathsep)
    if own not in paths:
        os.environ["PATH"] = os.pathsep.join([own, *paths])
