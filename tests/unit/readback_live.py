"""Live objects to read back: a run that stops as it begins, and steps taken by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from memfit.build.build import Materials
from memfit.engine import train as engine_train
from memfit.engine.readback.live import Facts, Live, live_of
from memfit.engine.readback.read import WATCHED_STEPS, read_after_steps, read_back
from memfit.engine.readback.seen import Seen
from memfit.engine.readback.watch import Watch
from memfit.engine.train import Job, count_steps, train
from memfit.inputs.data import load_samples
from memfit.inputs.data.options import check_options
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import require_weights
from memfit.inputs.run_folder import RunFolder
from memfit.specs.plan import Plan
from memfit.specs.proof import Check
from memfit.specs.recipe import Recipe
from memfit.trace.prepare import prepare


class Begun(Exception):
    """The run stands where its first step would come."""


class _Stop:
    """A callback that ends the run before its first step; all other events pass."""

    def __getattr__(self, name: str) -> Any:
        if name == "on_train_begin":
            raise Begun
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


@dataclass(frozen=True)
class Begin:
    """A prepared run: its live objects, its plan, and what stands beside it."""

    live: Live
    plan: Plan
    facts: Facts

    def before(self) -> tuple[Check, ...]:
        return read_back(self.live, self.plan, self.facts)

    def after(self, steps: int = WATCHED_STEPS) -> tuple[Check, ...]:
        """What is read after steps that are taken here."""
        return read_after_steps(self.live, self.plan, self.steps(steps), self.facts)

    def steps(self, count: int, steps: bool = True) -> Seen:
        """Watch optimizer steps of the prepared trainer, driven as its own loop drives them; without `steps` only their
        forwards and backwards."""
        trainer: Any = self.live.trainer
        watch, batches = Watch(self.live), iter(trainer.get_train_dataloader())
        for _ in range(count):
            taken = [next(batches) for _ in range(trainer.args.gradient_accumulation_steps)]
            items = sum(int((batch["labels"] != -100).sum()) for batch in taken)
            watch.begin()
            for batch in taken:
                trainer.training_step(trainer.model_wrapped, batch, items)
            watch.gradients()
            if steps:
                trainer.optimizer.step()
                trainer.lr_scheduler.step()
                trainer.state.global_step += 1
            trainer.model.zero_grad()
            watch.end()
        return watch.seen


def begin(recipe: Recipe, folder: Path, plant: Callable[[Any], None] | None = None) -> Begin:
    """A run of `recipe` as far as its first step. `plant` changes the trainer before anything is prepared."""
    prepared = prepare(recipe)
    plan, source = prepared.plan(), require_weights(prepared.source)
    loaded = load_samples(recipe.data, check_options(recipe), Encoder(source, recipe.image))
    folder.mkdir(parents=True)
    job = Job(plan, Materials(source, prepared.family, prepared.profile), loaded.train, loaded.eval, RunFolder(folder))
    found: dict[str, Any] = {}
    make = engine_train._trainer

    def stopping(job: Job, built: Any, *rest: Any) -> Any:
        trainer, recorder = make(job, built, *rest)
        if plant is not None:
            plant(trainer)
        found["live"] = functools.partial(live_of, trainer, built)
        trainer.add_callback(_Stop())
        return trainer, recorder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_train, "_trainer", stopping)
        with pytest.raises(Begun):
            train(job)
    steps = count_steps(plan.recipe, len(job.train), 1)
    return Begin(found["live"](), plan, Facts(steps.total, len(job.train), len(job.evaluate)))


def failed(checks: tuple[Check, ...]) -> set[str]:
    """Names of the levers that are not in effect."""
    return {check.lever for check in checks if check.ok is False}
