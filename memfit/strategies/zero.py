"""DeepSpeed ZeRO, stages 1 to 3: steady states. Buckets and gathered modules are engine terms, not states."""

from __future__ import annotations

from memfit.catalog.precisions import PRECISIONS
from memfit.specs.plan import Layout
from memfit.strategies.base import Strategy

STAGE_1_AND_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
TRANSIENT = ("reduce and prefetch buckets", "step temporaries of ZeRO", "NCCL buffers")


def layout_1(ranks: int) -> Layout:
    """Stage 1: whole gradients in `.grad`, and the owned slice once more."""
    return Layout(
        name="zero1",
        split_optimizer=ranks,
        gradient_copies=1,
        split_gradient_copies=ranks,
        source=f"{STAGE_1_AND_2}.copy_grads_in_partition",
    )


def layout_2(ranks: int) -> Layout:
    """Stage 2: of the gradients only the owned slice stays."""
    return Layout(
        name="zero2", split_gradients=ranks, split_optimizer=ranks, source=f"{STAGE_1_AND_2}.averaged_gradients"
    )


def layout_3(ranks: int) -> Layout:
    """Stage 3: everything split tensor by tensor; the gradient partitions are one buffer that stays."""
    return Layout(
        name="zero3",
        split_parameters=ranks,
        split_gradients=ranks,
        split_optimizer=ranks,
        split_unit="tensor",
        resident=("gradients",),
        source=f"{STAGE_3}.grad_partitions_flat_buffer",
    )


ZERO1, ZERO2, ZERO3 = (
    Strategy(
        name=name, layout=layout, source=source, casts_adapters=frozenset(PRECISIONS), not_forecast=(*extra, *TRANSIENT)
    )
    for name, layout, source, extra in (
        ("zero1", layout_1, STAGE_1_AND_2, ()),
        ("zero2", layout_2, STAGE_1_AND_2, ()),
        ("zero3", layout_3, STAGE_3, ("gathered modules and persistent parameters",)),
    )
)
