"""The processes of one run: who is first, and what they tell each other."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed

# How long a rank waits for the others in one exchange, and for a micro-batch of its own to end; loading a large model
# comes between two exchanges.
PATIENCE = datetime.timedelta(minutes=30)


def several() -> bool:
    """Whether this process belongs to a group, of one rank or more."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """This process's number; 0 without a group."""
    return distributed.get_rank() if several() else 0


def count() -> int:
    """How many processes; 1 without a group."""
    return distributed.get_world_size() if several() else 1


def is_first() -> bool:
    """Whether this process writes what all of them share."""
    return rank() == 0


def wait_for_all() -> None:
    """Go on when every rank has come here."""
    if count() > 1:
        distributed.barrier()


def summed(values: Sequence[int], device: torch.device) -> list[int]:
    """Each number summed over the ranks."""
    return _reduced(values, device, distributed.ReduceOp.SUM)


def largest(values: Sequence[int], device: torch.device) -> list[int]:
    """Of each number the largest over the ranks."""
    return _reduced(values, device, distributed.ReduceOp.MAX)


def _reduced(values: Sequence[int], device: torch.device, how: Any) -> list[int]:
    if count() == 1:
        return list(values)
    total = torch.tensor(list(values), dtype=torch.int64, device=device)
    distributed.all_reduce(total, how)
    return total.tolist()
