"""One process that holds everything."""

from __future__ import annotations

from memfit.specs.plan import Layout
from memfit.strategies.base import Strategy


def layout(ranks: int) -> Layout:
    return Layout(name="none", source="torch.autograd: one .grad a parameter that learns")


NONE = Strategy(name="none", layout=layout, source="one process", max_ranks=1)
