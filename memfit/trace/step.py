"""Trace one training step of an effective recipe on fake tensors. Read `trace_step` first."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn

from memfit.build.adapters import base_name
from memfit.build.arrange import Arranged, autocast_dtype
from memfit.families.base import Family
from memfit.inputs.cache import installed_versions
from memfit.physics.pinned import pinned_reserved
from memfit.planner.parts import ResolvedParts
from memfit.specs.events import EventKind, MemoryEvent
from memfit.specs.recipe import Recipe
from memfit.specs.trace import OUTSIDE, Device, Event, FlopsRow, StepTrace, TraceBatch
from memfit.trace import cpu, cuda
from memfit.trace.batch import make_batch
from memfit.trace.cuda import CudaKernels
from memfit.trace.fakes import Fakes
from memfit.trace.model import make_fake, meta_model, recompute_under
from memfit.trace.repeat import Run, blocks_of, left_out, plan_skips, unfold
from memfit.trace.summary import INPUT, Where, summarize
from memfit.trace.timeline import thinned
from memfit.trace.tracker import StepTracker, _tensors

Repeats = Callable[[str], bool]  # whether equal blocks of a part are traced once
ALL_PARTS: Repeats = lambda part: True  # noqa: E731
LANGUAGE: Repeats = lambda part: part == "language"  # noqa: E731  (a tower that gives an inner layer has odd ends)
WHOLE: Repeats = lambda part: False  # noqa: E731


@dataclass(frozen=True)
class TraceRequest:
    """What to trace: the model, an effective recipe (no `auto` in its levers), and one micro-batch.

    `accumulated`: gradients of an earlier micro-batch are there already.
    """

    family: Family
    config: Mapping[str, Any]
    recipe: Recipe
    parts: ResolvedParts
    batch: TraceBatch
    device: Device = "cpu"
    accumulated: bool = False


def trace_step(request: TraceRequest, whole: bool = False) -> StepTrace:
    """One forward, loss and backward of what `build` builds, as the training loop runs them.

    Of equal blocks three run, and their events stand for the others; `whole` runs every block. Raises UserError for a
    batch that does not fit the model.
    """
    start = time.perf_counter()
    locate = locator(request.family)
    traced = None
    for repeats in (WHOLE,) if whole else (ALL_PARTS, LANGUAGE, WHOLE):
        traced = traced or _traced(request, locate, repeats)
    assert traced is not None
    summary = summarize(traced.events, locate)
    return StepTrace(
        device=request.device,
        substitutions=traced.substitutions,
        inputs=traced.inputs,
        parameters=traced.parameters,
        gradients=summary.gradients,
        saved=summary.saved,
        peaks=summary.peaks,
        activation_peaks=summary.activation_peaks,
        parts=summary.parts,
        flops=traced.flops,
        versions=installed_versions(),
        seconds=time.perf_counter() - start,
        timeline=thinned(traced.events),
        events=tuple(traced.events),
        pinned=traced.pinned,
        written=sum(event.bytes for event in traced.events if event.kind == "alloc"),
        kernels=sum(event.kind == "alloc" for event in traced.events),
    )


@dataclass(frozen=True)
class _Traced:
    """What one run of the model gave; the fields are those of `StepTrace`."""

    events: Sequence[Event]
    pinned: int
    inputs: int
    parameters: int
    substitutions: tuple[str, ...]
    flops: tuple[FlopsRow, ...]


def _traced(request: TraceRequest, locate: Callable[[str], Where], repeats: Repeats) -> _Traced | None:
    """Run the model without the repeats in some parts; None where these turn out not to be alike."""
    arranged = meta_model(request.family, request.config, request.recipe, request.parts)
    model = arranged.model
    fakes = Fakes()
    make_fake(model, fakes)
    kernels = CudaKernels() if request.device == "gpu" else None
    tracker = StepTracker(fakes, model, cuda.workspace_bytes if kernels else cpu.workspace_bytes, locate)
    parameters = tracker.exclude([*model.parameters(), *model.buffers()])
    with _no_collection(), torch.random.fork_rng(devices=[]), tracker.watching():
        if kernels:
            recompute_under(model, kernels, tracker.on_host)
        blocks = {where: block for where, block in blocks_of(model, locate).items() if repeats(where[0])}
        runs = plan_skips(blocks, lambda: _look(request, model, tracker)) if blocks else ()
        with left_out([blocks[(run.part, block)] for run in runs for block in run.skipped]):
            inputs = _run(request, arranged, tracker, kernels or nullcontext())
    # Copied while the model lives: its gradients die with it, and that is no part of the step.
    events: list[Event] | None = list(tracker.events)
    if runs and events is not None:
        events = unfold(events, tracker.marks, runs, request.family.blocks)
    if events is None:
        return None
    used = tuple(sorted({*kernels.used, *_stand_ins(request)})) if kernels else ()
    on_device = [event for event in events if not event.kind.startswith("host")]
    return _Traced(on_device, _pinned(events), inputs, parameters, used, _flops(tracker, locate, runs))


def _stand_ins(request: TraceRequest) -> Iterator[str]:
    """Rows that a recipe asks for by its levers, whatever operators run."""
    if request.recipe.levers.attention == "flash":
        yield "flash-package"
    if request.recipe.levers.linear_attention == "fla":
        yield "fla-delta-rule"
    if request.recipe.levers.loss == "fused":
        yield "liger-loss"
    if request.parts.quantised:
        yield "bnb-4bit"


def _pinned(events: Sequence[Event]) -> int:
    """Page-locked host memory for what checkpointed layers keep there."""
    kinds: dict[str, EventKind] = {"host": "alloc", "host-free": "free"}
    return pinned_reserved(
        MemoryEvent(kinds[event.kind], event.storage, event.bytes) for event in events if event.kind in kinds
    )


def locator(family: Family) -> Callable[[str], Where]:
    """Gives the part and block of a module path or parameter name; what no part owns is `OUTSIDE`."""

    @cache
    def locate(path: str) -> Where:
        name = base_name(path + ".")
        try:
            part = family.part_of(name)
        except KeyError:
            return OUTSIDE, None
        prefix = family.blocks.get(part)
        if prefix is None or not name.startswith(prefix):
            return part, None
        number = name.removeprefix(prefix).partition(".")[0]
        return part, int(number) if number.isdigit() else None

    return locate


def _look(request: TraceRequest, model: nn.Module, tracker: StepTracker) -> None:
    """One forward that records nothing."""
    tracker.recording = False
    with tracker:
        batch = make_batch(request.family, request.config, request.batch, request.recipe.levers.packing)
        batch.pop("labels")
        model(**batch)


def _run(request: TraceRequest, arranged: Arranged, tracker: StepTracker, kernels: AbstractContextManager[Any]) -> int:
    """Forward, loss and backward under the tracker; returns the bytes of the batch."""
    model = arranged.model
    with tracker:
        tracker.recording = False
        batch = make_batch(request.family, request.config, request.batch, request.recipe.levers.packing)
        tracker.recording = True
        tracker.begin("forward")
        size = tracker.adopt(_tensors(batch), INPUT)
        handles = _follow_gradients(model, tracker, request.accumulated)
        labels = batch.pop("labels")
        with kernels:
            outputs = _forward(request, model)(**batch)
            tracker.begin("loss")
            loss = arranged.loss(outputs, labels)
        # Trainer.compute_loss returns the loss alone: outputs die before backward.
        del outputs
        tracker.begin("backward")
        loss.backward()
        for handle in handles:
            handle.remove()
    return size


def _forward(request: TraceRequest, model: nn.Module) -> Callable[..., Any]:
    """The forward as accelerate prepares it: under autocast it runs in it, and its outputs come back in fp32."""
    dtype = autocast_dtype(request.recipe)
    if dtype is None:
        return model

    def forward(**inputs: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return model(**inputs)

    return convert_outputs_to_fp32(forward)


def _follow_gradients(model: nn.Module, tracker: StepTracker, accumulated: bool) -> list[Any]:
    """Tell the tracker when a gradient is there; with `accumulated`, they are there from the beginning."""
    handles = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue

        def arrived(owner: torch.Tensor, name: str = name) -> None:
            if owner.grad is not None:
                tracker.mark_gradient(owner.grad, name)

        if accumulated:
            parameter.grad = torch.empty_like(parameter)
            arrived(parameter)
        handles.append(parameter.register_post_accumulate_grad_hook(arrived))
    return handles


def _flops(tracker: StepTracker, locate: Callable[[str], Where], runs: Sequence[Run]) -> tuple[FlopsRow, ...]:
    """By phase and part; the middle period of a run counts for all that it stands for."""
    counts: dict[tuple[str, str], int] = {}
    for (phase, path), count in tracker.flops.items():
        part, block = locate(path)
        for run in runs:
            if block is not None and run.part == part and run.place(block) == 1:
                count *= run.count - 2
        counts[(phase, part)] = counts.get((phase, part), 0) + count
    return tuple(FlopsRow(phase, part, count) for (phase, part), count in counts.items())


@contextmanager
def _no_collection() -> Iterator[None]:
    """Cyclic garbage is freed at moments that depend on everything else in the process; a trace must not."""
    with ExitStack() as stack:
        if gc.isenabled():
            gc.disable()
            stack.callback(gc.enable)
        yield
