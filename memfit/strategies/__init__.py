"""The values of `levers.parallel` that can be forecast. Adding one is a file and its line here."""

from __future__ import annotations

from memfit.strategies.base import Strategy
from memfit.strategies.ddp import DDP
from memfit.strategies.fsdp import FSDP
from memfit.strategies.none import NONE
from memfit.strategies.zero import ZERO1, ZERO2, ZERO3

STRATEGIES: dict[str, Strategy] = {row.name: row for row in (NONE, DDP, ZERO1, ZERO2, ZERO3, FSDP)}
