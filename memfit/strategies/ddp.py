"""DistributedDataParallel: everything on every rank, and buckets that hold the gradients once more."""

from __future__ import annotations

from memfit.specs.plan import Layout
from memfit.strategies.base import Strategy

SOURCE = (
    "torch.nn.parallel:DistributedDataParallel(gradient_as_bucket_view=False): the reducer's buckets are a second copy "
    "of all gradients, made when the model is wrapped"
)


def layout(ranks: int) -> Layout:
    return Layout(name="ddp", gradient_copies=1, resident=("gradient copies",), source=SOURCE)


DDP = Strategy(name="ddp", layout=layout, source=SOURCE, not_forecast=("NCCL buffers",))
