"""Read every lever back from live objects, on every rank: `read_back` before the first step, `read_after_steps` later.

Inside a trainer's callback (`ReadBack` is one, and does all of it):

    on_train_begin          live = live_of(trainer, built, batches); checks = read_back(live, plan, facts)
                            watch = Watch(live)
    on_step_begin           watch.begin()        # two steps, of which neither bytes nor seconds are measured
    on_pre_optimizer_step   watch.gradients()
    on_step_end             watch.end()
    after two steps         checks += read_after_steps(live, plan, watch.seen, facts)

All ranks must call both functions: what one found goes to all, and every rank returns the same checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import TrainerCallback

from memfit.engine.readback import (
    adapters,
    attention,
    checkpointing,
    data,
    engines,
    images,
    learning,
    loss,
    optimizer,
    parameters,
    process,
    schedule,
)
from memfit.engine.readback.live import Asked, Facts, Live
from memfit.engine.readback.reading import Reading, across_ranks, tried
from memfit.engine.readback.seen import Seen
from memfit.engine.readback.watch import Watch
from memfit.specs.plan import Plan
from memfit.specs.proof import Check

WATCHED_STEPS = 2  # the second runs with the optimizer's states there, and at a rate above zero

Before = Callable[[Live, Asked], Iterable[Reading]]
After = Callable[[Live, Asked, Seen], Iterable[Reading]]

BEFORE: Mapping[str, Before] = {
    "parameters": parameters.read,
    "adapters": adapters.read,
    "engine": engines.read,
    "process": process.read,
    "optimizer": optimizer.read,
    "schedule": schedule.read,
    "images": images.read,
    "data": data.read,
    "loss": loss.read,
}
AFTER: Mapping[str, After] = {
    "gradients": learning.read,
    "optimizer states": optimizer.read_states,
    "schedule": schedule.read_after,
    "checkpointing": checkpointing.read,
    "attention": attention.read,
    "loss": loss.read_after,
    "compute": process.read_after,
}


def read_back(live: Live, plan: Plan | None, facts: Facts | None = None) -> tuple[Check, ...]:
    """What stands before the first step: parameters, engine, optimizer, schedule, data. Every rank must call it."""
    asked = Asked(plan, facts or Facts())
    return across_ranks(tried((name, _bound(reader, live, asked)) for name, reader in BEFORE.items()))


def read_after_steps(live: Live, plan: Plan | None, seen: Seen, facts: Facts | None = None) -> tuple[Check, ...]:
    """What only steps show: gradients, optimizer states, recomputing, kernels. Every rank must call it.

    `seen` is that of a `Watch` over at least `WATCHED_STEPS` optimizer steps.
    """
    asked = Asked(plan, facts or Facts())
    return across_ranks(tried((name, _bound(reader, live, asked, seen)) for name, reader in AFTER.items()))


class ReadBack(TrainerCallback):
    """Reads a trainer back as it begins, and again after `WATCHED_STEPS` steps; `checks` holds what it found.

    `make` gives the live objects once everything is prepared.
    """

    def __init__(self, make: Callable[[], Live], plan: Plan | None, facts: Facts | None = None) -> None:
        self._make, self._plan, self._facts = make, plan, facts
        self._live: Live | None = None
        self._watch: Watch | None = None
        self.checks: tuple[Check, ...] = ()
        self.text = ""

    @property
    def seen(self) -> Seen | None:
        """What the watched steps showed."""
        return None if self._watch is None else self._watch.seen

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._live = self._make()
        self.checks = read_back(self._live, self._plan, self._facts)
        self.text = data.marked_text(self._live)
        self._watch = Watch(self._live)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._watch is not None and self._watch.seen.steps < WATCHED_STEPS:
            self._watch.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._watch is not None and self._watch.watching:
            self._watch.gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._live is None or self._watch is None or not self._watch.watching:
            return
        self._watch.end()
        if self._watch.seen.steps == WATCHED_STEPS:
            self.checks += read_after_steps(self._live, self._plan, self._watch.seen, self._facts)

    def close(self) -> None:
        """Stop watching, also in the middle of a step that has failed: the modes would act on whatever comes next."""
        if self._watch is not None:
            self._watch.end()


def _bound(reader: Callable[..., Iterable[Reading]], *values: Any) -> Callable[[], Iterable[Reading]]:
    return lambda: reader(*values)
