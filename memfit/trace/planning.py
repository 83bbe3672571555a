"""The search of `memfit plan` on a prepared recipe: steps are traced when they matter, and kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import cast

from memfit.inputs.trace_cache import load_trace
from memfit.planner.axes import axes_of
from memfit.planner.counting import Counting
from memfit.planner.engine_stages import Stages
from memfit.planner.parts import parameter_groups, resolve_parts
from memfit.planner.search import Search
from memfit.planner.tables import Model
from memfit.specs.plan import Forecast
from memfit.specs.recipe import PartName, Recipe
from memfit.specs.trace import Row, StepTrace, TraceBatch
from memfit.specs.workload import ImageCost, LoaderLoad
from memfit.trace.forecast import as_it_runs, default_load, forecast_plan, key_of, stages_of, step_trace, trace_batch
from memfit.trace.prepare import Prepared
from memfit.trace.request import TraceRequest

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Data:
    """The user's data as a search sees them: the worst micro-batch of so many rows, and what the loader holds for it.

    Empty rows and None where there are no data: the recipe's workload, or the documented default, stands in.
    `longest`: tokens of the longest sample; `heaviest`: the pictures of the sample with the most patches; `pictures`:
    every picture's cost once; `under`: the same data read for another recipe. All are empty without data.
    """

    rows: Callable[[int], Sequence[Row]] = lambda micro: ()
    load: Callable[[int], LoaderLoad | None] = lambda micro: None
    longest: int | None = None
    heaviest: tuple[ImageCost, ...] = ()
    pictures: tuple[ImageCost, ...] = ()
    under: Callable[[Recipe], Data] | None = None


NO_DATA = Data()


def search_of(prepared: Prepared, data: Data = NO_DATA, say: Say = lambda text: None) -> Search:
    """A search over all that the recipe leaves open. UserError where nothing goes together with its pins."""
    resolved = resolve_parts(prepared.recipe, prepared.family, prepared.profile)
    modes = {cast(PartName, part): mode for part, mode in resolved.modes.items()}
    prepared = dataclasses.replace(prepared, recipe=dataclasses.replace(prepared.recipe, parts=modes))
    axes = axes_of(prepared.recipe, prepared.hardware, prepared.profile)
    groups = parameter_groups(prepared.profile, resolved, prepared.recipe.lora)
    steps = TracedSteps(prepared, data, say)
    return Search(axes, Model(groups, prepared.profile.buffers_bytes, steps.load), steps)


class TracedSteps:
    """Steps and forecasts of one prepared recipe (`memfit.planner.search.Tracer`)."""

    def __init__(self, prepared: Prepared, data: Data, say: Say) -> None:
        self.prepared, self.data, self.say = prepared, data, say
        self.parts = resolve_parts(prepared.recipe, prepared.family, prepared.profile)
        self.made: dict[str, StepTrace] = {}
        self._keys: dict[Hashable, str] = {}
        self._requests: dict[str, TraceRequest] = {}
        self._loads: dict[int, LoaderLoad] = {}
        self._sizes: dict[int, tuple[int, ...]] = {}

    def kind(self, counting: Counting) -> Hashable:
        """Dtypes as they run, and what the engine replaces."""
        recipe = as_it_runs(counting.recipe, counting)
        levers = recipe.levers
        return (levers.precision, levers.autocast, recipe.lora.dtype, levers.parallel, counting.strategy.replaces)

    def sizes(self, micro: int) -> tuple[int, ...]:
        """Padded tokens, patches and trained tokens of the worst micro-batch of so many rows."""
        if micro not in self._sizes:
            batch = self._batch(micro)
            patches = sum(cost.patches for images in batch.images for cost in images)
            tokens = len(batch.rows) * max(batch.rows)
            rows = self.data.rows(micro)
            trained = sum(row.tokens if row.trained is None else row.trained for row in rows) if rows else tokens
            self._sizes[micro] = (tokens, patches, trained)
        return self._sizes[micro]

    def step(self, counting: Counting) -> tuple[StepTrace, Stages]:
        """The step from this process, the cache, a tape or a new trace."""
        key = self._key(counting)
        if key not in self.made:
            cached = load_trace(key)
            if cached is not None:
                self.made[key] = cached
            else:
                levers = counting.recipe.levers
                self.say(
                    f"tracing a step: {levers.precision}, checkpointing {levers.checkpointing}, loss {levers.loss}, "
                    f"micro-batch {levers.micro_batch}"
                )
        trace = self.made.get(key) or step_trace(self.prepared, self._requests[key], self.made)
        return trace, stages_of(self.prepared, counting, trace)

    def forecast(self, recipe: Recipe) -> Forecast:
        """As `memfit estimate` gives it for the same recipe."""
        micro = int(recipe.levers.micro_batch)
        prepared = dataclasses.replace(self.prepared, recipe=recipe)
        return forecast_plan(prepared, self.data.rows(micro), self.data.load(micro), self.made).forecast

    def load(self, micro: int) -> LoaderLoad:
        """What the loader holds for micro-batches of so many rows."""
        if micro not in self._loads:
            batch = self._batch(micro)
            self._loads[micro] = self.data.load(micro) or default_load(self.prepared, self.prepared.recipe, batch)
        return self._loads[micro]

    def _batch(self, micro: int) -> TraceBatch:
        """The worst micro-batch of so many rows, logits of all tokens counted."""
        levers = dataclasses.replace(self.prepared.recipe.levers, micro_batch=micro)
        recipe = dataclasses.replace(self.prepared.recipe, levers=levers)
        return trace_batch(self.prepared, recipe, self.data.rows(micro))

    def _key(self, counting: Counting) -> str:
        levers = counting.recipe.levers
        accumulated = counting.micro_batches > 1 and counting.layout.engine.keep_ways == 1
        under = (self.kind(counting), accumulated, levers.micro_batch)
        short = (*under, str(levers.checkpointing), levers.loss, levers.activation_offload)
        if short not in self._keys:
            request = TraceRequest(
                family=self.prepared.family,
                config=self.prepared.source.config,
                recipe=as_it_runs(counting.recipe, counting),
                parts=self.parts,
                batch=trace_batch(self.prepared, counting.recipe, self.data.rows(int(levers.micro_batch))),
                device="gpu" if self.prepared.hardware.gpu else "cpu",
                accumulated=accumulated,
                replaced=counting.strategy.replaces,
            )
            self._keys[short] = key_of(self.prepared, request)
            self._requests[self._keys[short]] = request
        return self._keys[short]
