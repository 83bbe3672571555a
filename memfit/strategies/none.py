"""One process that holds everything."""

from __future__ import annotations

from memfit.specs.plan import Layout
from memfit.strategies.base import Request, Strategy, engine_values


def layout(request: Request) -> Layout:
    engine_values("", {}, request.values)
    return Layout(name="none", source="torch.autograd: one .grad a parameter that learns")


NONE = Strategy(name="none", layout=layout, source="one process", max_ranks=1)
