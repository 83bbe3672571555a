"""Trace one training step of an effective recipe on fake tensors. Read `trace_step` first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn

from memfit.build.arrange import Arranged, autocast_dtype
from memfit.errors import UserError
from memfit.families.names import base_name, locator
from memfit.specs.trace import StepTrace
from memfit.trace import cpu, cuda
from memfit.trace.batch import make_batch
from memfit.trace.collection import no_collection
from memfit.trace.cuda import CudaKernels
from memfit.trace.fakes import Fakes
from memfit.trace.flash import attention_passes
from memfit.trace.model import make_fake, meta_model, recompute_under, recomputed_loss
from memfit.trace.recording import Recording, settled, step_of
from memfit.trace.repeat import blocks_of, is_left_out, left_out, plan_skips
from memfit.trace.request import TraceRequest
from memfit.trace.summary import INPUT
from memfit.trace.tracker import StepTracker, _tensors
from memfit.trace.zero import ROW as ZERO3_LINEAR
from memfit.trace.zero import Zero3Linear

Repeats = Callable[[str], bool]  # whether equal blocks of a part are traced once
ALL_PARTS: Repeats = lambda part: True  # noqa: E731
LANGUAGE: Repeats = lambda part: part == "language"  # noqa: E731  (a tower that gives an inner layer has odd ends)
WHOLE: Repeats = lambda part: False  # noqa: E731


def trace_step(request: TraceRequest, whole: bool = False) -> StepTrace:
    """One forward, loss and backward of what `build` builds, as the training loop runs them.

    Of equal blocks between like neighbours one runs, and its events stand for the others; `whole` runs every block.
    Raises UserError for a batch that does not fit the model.
    """
    start = time.perf_counter()
    return replace(recorded_step(request, whole)[1], seconds=time.perf_counter() - start)


def recorded_step(request: TraceRequest, whole: bool = False) -> tuple[Recording, StepTrace]:
    """The recording, in which as many blocks stand for others as turn out to be alike, and its step.

    Raises as `trace_step` does.
    """
    for repeats in (WHOLE,) if whole else (ALL_PARTS, LANGUAGE, WHOLE):
        recording = record_step(request, repeats)
        step = step_of(recording, request.family)
        if step is not None:
            return recording, step
    raise AssertionError("a step whose blocks all ran has none to write in")


def record_step(request: TraceRequest, repeats: Repeats = ALL_PARTS) -> Recording:
    """Run the model without the repeats in some parts. Raises as `trace_step` does."""
    locate = locator(request.family)
    arranged = meta_model(request.family, request.config, request.recipe, request.parts)
    model = arranged.model
    fakes = Fakes()
    make_fake(model, fakes)
    kernels = CudaKernels() if request.device == "gpu" else None
    tracker = StepTracker(fakes, model, cuda.workspace_bytes if kernels else cpu.workspace_bytes, locate)
    parameters = tracker.exclude([*model.parameters(), *model.buffers()])
    with no_collection(), torch.random.fork_rng(devices=[]), tracker.watching():
        modes = [mode for mode in (kernels, Zero3Linear() if ZERO3_LINEAR in request.replaced else None) if mode]
        recompute_under(model, modes, tracker.on_host if kernels else None, _keeper(request, tracker))
        arranged = replace(arranged, loss=recomputed_loss(arranged.loss, modes))
        blocks = {where: block for where, block in blocks_of(model, locate).items() if repeats(where[0])}
        folds = plan_skips(blocks, lambda: _look(request, model, tracker)) if blocks else ()
        with left_out([blocks[(fold.part, block)] for fold in folds for block in fold.skipped]):
            try:
                inputs = _run(request, arranged, tracker, modes)
            except cpu.MixedNorm as found:
                raise _not_on_cpu(request, model, found) from None
    return Recording(
        device=request.device,
        substitutions=tuple(sorted({*(kernels.used if kernels else ()), *_stand_ins(request)})),
        parameters=parameters,
        inputs=inputs,
        # Copied while the model lives: its gradients die with it, and that is no part of the step.
        events=settled(tracker.events, tracker.marks),
        marks=tuple(tracker.marks),
        folds=folds,
        flops=dict(tracker.flops),
    )


def _not_on_cpu(request: TraceRequest, model: nn.Module, found: cpu.MixedNorm) -> UserError:
    """A frozen 16-bit norm behind a part that learns in fp32: real CPU tensors would end in torch's traceback."""
    place = found.weight.untyped_storage()._cdata
    name = next(name for name, one in model.named_parameters() if one.untyped_storage()._cdata == place)
    module = base_name(name).rpartition(".")[0]
    part, (width, given) = locator(request.family)(module)[0], map(_short, (found.weight.dtype, found.given))
    precision = request.recipe.levers.precision
    mode = {str(key): value for key, value in request.recipe.parts.items()}.get(part, "frozen")
    return UserError(
        f"levers.precision: {precision} leaves {module} in {width} (parts.{part}: {mode}), what comes before it hands "
        f"it {given}, and torch's CPU norms take no 16-bit weights with {given}",
        f"levers.precision: pure-bf16 or fp32, or parts.{part}: full",
    )


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))


def _stand_ins(request: TraceRequest) -> Iterator[str]:
    """Rows that a recipe asks for by its levers and its engine, whatever operators run."""
    yield from request.replaced
    if request.device == "cpu":
        return
    if request.recipe.levers.attention == "flash":
        yield "flash-package"
    if request.recipe.levers.linear_attention == "fla":
        yield "fla-delta-rule"
    if request.recipe.levers.loss == "fused":
        yield "liger-loss"
    if request.parts.quantised:
        yield "bnb-4bit"


def _look(request: TraceRequest, model: nn.Module, tracker: StepTracker) -> None:
    """One forward that records nothing."""
    tracker.recording = False
    with tracker, attention_passes(model):
        batch = make_batch(request.family, request.config, request.batch, request.recipe.levers.packing)
        batch.pop("labels")
        _forward(request, model)(**batch)


def _keeper(request: TraceRequest, tracker: StepTracker) -> Callable[[nn.Module], Any]:
    """What checkpointing keeps on the device for each call of a layer, beside its tensors: on a CPU the generator."""
    if request.device == "gpu":
        return lambda layer: None
    return lambda layer: None if is_left_out(layer) else tracker.keep_generator(layer)


def _run(
    request: TraceRequest, arranged: Arranged, tracker: StepTracker, modes: Sequence[AbstractContextManager[Any]]
) -> int:
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
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
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
