"""Where a step is: phases told by hooks on live objects, and what the device's allocator says of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import Variable

from memfit.engine.measuring.live import LiveTensors
from memfit.inputs.machine import own_gpu_bytes


def held_on_gpu() -> int | None:
    """What the driver says that this process holds on its GPU; None where it does not say."""
    return own_gpu_bytes() or None


@dataclass
class Peak:
    """The most bytes of one phase on a GPU, by torch's allocator, over all steps that were watched."""

    allocated: int = 0
    reserved: int = 0


@dataclass
class Meter:
    """Told of every phase. `peaks`: a GPU's, empty on CPU ranks. `seconds`: of the last step that `timed` was set for,
    by "micro" (one micro-batch) and "step" (the optimizer's)."""

    device: torch.device
    tracker: LiveTensors | None = None
    measured: bool = True
    timed: bool = False
    peaks: dict[str, Peak] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    phase: str = ""
    before_step: Callable[[], None] | None = None
    _since: float = 0.0

    def enter(self, phase: str) -> None:
        """`phase` begins, and the one before it ends."""
        if phase == self.phase:
            return
        self._close()
        if phase == "step" and self.before_step is not None:
            self.before_step()
        self.phase = phase
        if self.tracker is not None:
            self.tracker.enter(phase)
        if self.timed and phase in ("forward", "step", ""):
            self._clock(phase)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _clock(self, phase: str) -> None:
        self.wait()
        now = time.perf_counter()
        last, self._since = self._since, now
        if phase == "step":
            self.seconds.setdefault("micro", []).append(now - last)
        elif phase == "":
            self.seconds.setdefault("step", []).append(now - last)

    def _close(self) -> None:
        if self.device.type != "cuda" or not self.measured:
            return
        if self.phase:
            found = self.peaks.setdefault(self.phase, Peak())
            found.allocated = max(found.allocated, torch.cuda.max_memory_allocated(self.device))
            found.reserved = max(found.reserved, torch.cuda.max_memory_reserved(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)


class Marks:
    """Hooks that tell a meter of forward, loss, backward and step. `remove` takes all of them away.

    Nothing of the step is changed: a hook on the outermost module, one on the loss, and under DeepSpeed, whose engine
    steps inside backward, a wrapper around this one engine's `step`.
    """

    def __init__(self, trainer: Any, meter: Meter, inputs: Callable[[Any, bool], None]) -> None:
        self._trainer, self._meter, self._inputs = trainer, meter, inputs
        self._loss = trainer.compute_loss_func
        wrapped = trainer.model_wrapped
        self._handles = [
            wrapped.register_forward_pre_hook(self._forward, with_kwargs=True),
            wrapped.register_forward_hook(self._left),
        ]
        trainer.compute_loss_func = self._marked_loss
        self._engine = wrapped if trainer.is_deepspeed_enabled else None
        if self._engine is not None:
            mark_step(self._engine, meter)

    def remove(self) -> None:
        """Leave the trainer as it was."""
        for handle in self._handles:
            handle.remove()
        self._trainer.compute_loss_func = self._loss
        if self._engine is not None:
            del self._engine.step

    def _forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            self._inputs(kwargs, True)
            self._meter.enter("forward")

    def _left(self, module: Any, args: Any, output: Any) -> None:
        if module.training:
            self._meter.enter("loss")

    def _marked_loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        self._inputs([labels], False)
        loss: torch.Tensor = self._loss(outputs, labels, num_items_in_batch=num_items_in_batch)
        if loss.requires_grad:
            loss.register_hook(self._backward)
        return loss

    def _backward(self, gradient: torch.Tensor) -> None:
        self._meter.enter("backward")
        if self._engine is None:
            # Twice over, so that it runs behind what FSDP2 has the engine call at the end of backward.
            queue = Variable._execution_engine.queue_callback
            queue(lambda: queue(lambda: self._meter.enter("step")))


def mark_step(engine: Any, meter: Meter) -> None:
    """Let a DeepSpeed engine tell when it steps; `del engine.step` takes that back."""
    step = engine.step

    def marked(*args: Any, **kwargs: Any) -> Any:
        meter.enter("step")
        done = step(*args, **kwargs)
        meter.enter("")
        return done

    engine.step = marked
