"""The forecast of the user's own worst micro-batch: that of all that may be it which takes the most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memfit.planner.activations import peak_of
from memfit.planner.worst import Chosen, worst_batches
from memfit.specs.plan import Plan
from memfit.specs.sample import Sample
from memfit.specs.trace import Row, StepTrace
from memfit.specs.workload import LoaderLoad, SampleCost
from memfit.trace.forecast import forecast_plan
from memfit.trace.prepare import Prepared

if TYPE_CHECKING:
    from memfit.inputs.encode import Encoder


def worst_plan(
    prepared: Prepared, data: tuple[Sequence[Sample], Sequence[SampleCost]], encoder: Encoder, load: LoaderLoad
) -> tuple[Plan, tuple[Chosen, ...]]:
    """The plan with the forecast of the batch that takes the most, and the batches, that one first.

    `data`: samples with their costs. Raises UserError as `forecast_plan` does.
    """
    samples, costs = data
    made: dict[str, StepTrace] = {}
    micro = int(prepared.plan().recipe.levers.micro_batch)
    chosen = worst_batches(costs, micro, bool(prepared.recipe.levers.packing))
    found = [(forecast_plan(prepared, rows_at(samples, costs, encoder, one.places), load, made), one) for one in chosen]
    if not found:
        return forecast_plan(prepared, (), load), ()
    plan, first = max(found, key=lambda pair: (peak_of(pair[0].forecast) or ("", 0))[1])
    return plan, (first, *(one for one in chosen if one is not first))


def rows_at(
    samples: Sequence[Sample], costs: Sequence[SampleCost], encoder: Encoder, places: Sequence[int]
) -> tuple[Row, ...]:
    """Samples as a trace takes them."""
    from memfit.inputs.data.images import read_size

    rows = []
    for place in places:
        sample = samples[place]
        encoded = encoder.encode(sample, [read_size(path) for path in sample.images])
        rows.append(Row(len(encoded.input_ids), encoded.image_costs, costs[place].trained_tokens))
    return tuple(rows)
