"""DistributedDataParallel: everything on every rank, and buckets that hold the gradients once more."""

from __future__ import annotations

from typing import Any

from memfit.specs.plan import Layout, Plan
from memfit.strategies.base import Request, Strategy, engine_values

SOURCE = (
    "torch.nn.parallel:DistributedDataParallel(gradient_as_bucket_view=False): the reducer's buckets are a second copy "
    "of all gradients, made when the model is wrapped"
)
BUCKET_MIB = 25  # DistributedDataParallel's own default for bucket_cap_mb
VALUES: dict[str, Any] = {"gradient_as_bucket_view": False}


def layout(request: Request) -> Layout:
    values = engine_values("ddp", VALUES, request.values)
    copies = 0 if values["gradient_as_bucket_view"] else 1
    return Layout(name="ddp", gradient_copies=copies, resident=("gradient copies",), source=SOURCE)


def engine_config(plan: Plan) -> dict[str, Any]:
    """The arguments of DistributedDataParallel. Every parameter that learns gets a gradient in every micro-batch."""
    return {
        "gradient_as_bucket_view": engine_values("ddp", VALUES, plan.recipe.engine)["gradient_as_bucket_view"],
        "bucket_cap_mb": BUCKET_MIB,
        "find_unused_parameters": False,
        "broadcast_buffers": False,
        "static_graph": False,
    }


DDP = Strategy(
    name="ddp",
    layout=layout,
    source=SOURCE,
    not_forecast=("NCCL buffers",),
    section="ddp",
    values=VALUES,
    engine_config=engine_config,
)
