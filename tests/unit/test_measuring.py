"""What the proof measures: its tracker against torch's own profiler, and against sums by hand."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from benchmarks.accuracy_cpu.events import Profiler
from memfit.engine.measuring.live import LiveTensors
from memfit.engine.measuring.outside import Outside
from memfit.engine.measuring.read import course_json
from memfit.specs.recipe import Recipe
from tests.unit.test_build import batch_of, built_from, samples_of

Make = Callable[..., Recipe]
PHASES = ("forward", "loss", "backward", "step")
SCRATCH = 256


def step(built: Any, optimizer: torch.optim.Optimizer, batch: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """A step as the loop takes it; `say` hears of every phase as it begins."""
    inputs = dict(batch)
    labels = inputs.pop("labels")
    say("forward")
    outputs = built.model(**inputs)
    say("loss")
    loss = built.loss(outputs, labels, (labels[:, 1:] != -100).sum())
    del outputs
    say("backward")
    loss.backward()
    say("step")
    optimizer.step()
    say("")
    optimizer.zero_grad(set_to_none=True)


def profiled(built: Any, optimizer: torch.optim.Optimizer, batch: Mapping[str, Any]) -> dict[str, int]:
    """The most bytes above those of the step's begin in every phase, by the CPU allocator's own reports."""
    watch = Profiler()
    gc.collect()
    gc.disable()
    with watch:
        marks: list[str] = []

        def say(phase: str) -> None:
            with watch.mark(f"at {len(marks)} {phase}"):
                marks.append(phase)

        step(built, optimizer, batch, say)
    gc.enable()
    memory, seen = watch.read()
    starts = [(mark.start, mark.name.split(" ", 2)[2]) for mark in seen if mark.name.startswith("at ")]
    now, found = 0, dict.fromkeys(PHASES, 0)
    for event in memory:
        phase = next((name for begin, name in reversed(starts) if begin <= event.time), "")
        now += event.size
        if phase in found:
            found[phase] = max(found[phase], now)
    return found


def tracked(built: Any, optimizer: torch.optim.Optimizer, batch: Mapping[str, Any]) -> tuple[dict[str, int], Any]:
    """The same, by the tracker; and its figures."""
    tracker = LiveTensors(built.model)
    tracker.adopt_rest("held")
    tracker.begin()
    base = sum(tracker.course.base.values())

    with tracker:
        step(built, optimizer, batch, tracker.enter)
    return {name: size - base for name, (size, _) in tracker.course.peaks().items() if name}, course_json(tracker)


@pytest.mark.parametrize(
    ("kind", "sets"),
    [
        ("minicpmv4_6", ()),
        ("llava", ("method=lora", "levers.checkpointing=full")),
        ("llama", ("levers.precision=pure-bf16", "levers.loss=chunked")),
    ],
)
def test_the_tracker_sees_what_the_profiler_sees(recipe: Make, kind: str, sets: tuple[str, ...]) -> None:
    wanted = recipe(kind, *sets)
    built = built_from(wanted)
    built.model.train()
    learning = [p for p in built.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
    batch = batch_of(built, samples_of(wanted), 0, 1)
    for _ in range(2):
        step(built, optimizer, batch, lambda phase: None)
    one, (two, _) = profiled(built, optimizer, batch), tracked(built, optimizer, batch)
    # Kernels' own scratch is no tensor: a few numbers of a norm, here. A checkpointed layer keeps the state of the
    # generator, which no operator makes: the tracker finds it when forward has ended.
    kept = {"forward": 5056 * sum(built.checkpointed.values())}
    for name in PHASES:
        assert two[name] == pytest.approx(one[name], abs=SCRATCH + kept.get(name, 0)), name


def test_a_freed_storage_is_nobodys() -> None:
    """Its number may be another's the next moment: the run's own tensor must not be taken for a stranger's."""
    stays, goes = torch.zeros(8), torch.zeros(8)
    numbers = [tensor.untyped_storage()._cdata for tensor in (stays, goes)]
    outside = Outside([stays, goes, stays.view(2, 4)])
    assert len(outside) == 2
    del goes
    assert [number in outside for number in numbers] == [True, False]
