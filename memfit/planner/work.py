"""Seconds of one optimizer step of a counted set-up and a traced micro-batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from memfit.physics.engine_work import Ranks, States, with_layout
from memfit.physics.memory import numel
from memfit.physics.rates import rates_of, traced_work
from memfit.physics.speed import Number, Rates, StepTime, StepWork, step_time
from memfit.planner.counting import Counting, roles_of
from memfit.planner.engine_terms import whole_rows
from memfit.planner.parts import shapes
from memfit.specs.plan import Speed
from memfit.specs.trace import StepTrace, TraceBatch

PRODUCTS: Mapping[str, str] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# Where the catalogue knows no rates (CPU ranks, unknown cards) candidates are still put in order: by these, whose
# relations are those of a server's cores. No second of them is ever shown.
ORDER_ONLY = Rates(products=1e12, memory=1e11, ring=1e10, host_link=5e10)


def rates_for(counting: Counting) -> Rates | None:
    """What the hardware does in a second in the precision that is computed with; None where that is not known."""
    return rates_of(counting.hardware, PRODUCTS[counting.precision.compute])


def states_of(counting: Counting) -> States:
    """Elements and widths of the layout's traffic; widths are means over all parameters, so that totals are exact."""
    rows = [(row.numel, width) for row, width, _ in whole_rows(counting)]
    elements = sum(count for count, _ in rows)
    whole = sum((count + 1) // 2 if width == 0 else count * width for count, width in rows)
    roles = [(role, numel(shapes(found))) for group in counting.groups for role, found in roles_of(group)]
    learning = sum(count for _, count in roles)
    moments = sum(
        size
        for group in counting.groups
        for role, found in roles_of(group)
        for size in counting.whole_optimizer(role, found)
    )
    each = max(1, learning)
    master = sum(count * counting.stepped_width(role) for role, count in roles) / each
    held = master * each if counting.has_master else 0.0
    return States(
        elements=elements,
        learning=learning,
        width=whole / max(1, elements),
        gradient=sum(count * counting.width(role) for role, count in roles) / each,
        master=master,
        moments=max(0.0, moments - held) / each,
        modules=len({row.module for row, _, _ in whole_rows(counting)}),
    )


def overlaps(counting: Counting) -> bool:
    """Whether the engine's collectives run beside computation.

    DeepSpeed gathers and reduces on streams of their own with `overlap_comm` only (deepspeed.runtime.zero.stage3:
    DeepSpeedZeroOptimizer_Stage3.__init__); DistributedDataParallel and fully_shard always do.
    """
    values = counting.strategy.values
    return bool(engine_value(counting, "overlap_comm")) if "overlap_comm" in values else counting.hardware.ranks > 1


def engine_value(counting: Counting, key: str) -> Any:
    """A value of the engine in force: the recipe's, else memfit's own."""
    own = counting.recipe.engine.get(counting.strategy.section, {})
    return own.get(key, counting.strategy.values.get(key)) if isinstance(own, Mapping) else None


def step_work(counting: Counting, work: StepWork, states: States, pinned: Number) -> StepWork:
    """Micro-batches as the layout runs them; `work` says how many a step. `pinned`: bytes of activations that go to
    the host and come back in each of them."""
    hardware = counting.hardware
    ranks = Ranks(hardware.ranks, hardware.gpus_per_node, overlaps(counting))
    made = with_layout(work, states, counting.layout, ranks)
    return dataclasses.replace(made, down_bytes=made.down_bytes + pinned, up_bytes=made.up_bytes + pinned)


def time_of(counting: Counting, trace: StepTrace) -> StepTime | None:
    """Seconds of a step in which every micro-batch is the traced one; None where work or rates are not known."""
    work, rates = traced_work(trace), rates_for(counting)
    if work is None or rates is None:
        return None
    work = dataclasses.replace(work, micro_batches=counting.micro_batches)
    return step_time(step_work(counting, work, states_of(counting), float(trace.pinned)), rates)


def speed_of(counting: Counting, trace: StepTrace, batch: TraceBatch) -> Speed | None:
    """The speed of a forecast, at the traced micro-batch: the worst one, so that a mean step is not slower."""
    found = time_of(counting, trace)
    if found is None:
        return None
    seconds = float(found.seconds)
    tokens = sum(batch.rows) * counting.micro_batches * counting.hardware.ranks
    return Speed(seconds, tokens / seconds, str(found.bound), float(found.low), float(found.high))
