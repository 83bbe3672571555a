"""FSDP2 (fully_shard): each tensor split along its first dimension; gathered blocks are engine terms."""

from __future__ import annotations

from memfit.specs.plan import Layout
from memfit.strategies.base import Strategy

SOURCE = "torch.distributed.fsdp:fully_shard (FSDPParam shards dimension 0 by chunks)"


def layout(ranks: int) -> Layout:
    return Layout(
        name="fsdp",
        split_parameters=ranks,
        split_gradients=ranks,
        split_optimizer=ranks,
        split_unit="rows",
        source=SOURCE,
    )


FSDP = Strategy(
    name="fsdp",
    layout=layout,
    source=SOURCE,
    casts_adapters=frozenset({"bf16-amp", "bf16-mixed"}),
    not_forecast=("gathered blocks", "NCCL buffers"),
)
