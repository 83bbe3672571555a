"""A few steps of a cloned trainer, looked at: phases told by hooks, every live tensor followed, seconds and peaks."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import TrainerCallback

from memfit.engine.measuring.following import followed
from memfit.engine.measuring.live import LiveTensors, plain, reachable
from memfit.engine.measuring.meter import Meter, held_on_gpu, mark_step
from memfit.engine.measuring.outside import Outside
from memfit.engine.measuring.read import course_json
from memfit.engine.measuring.states import states_of, walk
from memfit.engine.proof import Measured, Stage

GRADIENTS = "gradients"


class Phases:
    """Tells a meter of forward, loss, backward and step, by hooks and by attributes of this one accelerator.

    The loss begins where the model's head has run: transformers' models compute it inside their own forward.
    """

    def __init__(self, trainer: Any, meter: Meter, inputs: Callable[[Any], None]) -> None:
        self._meter, self._inputs, self._accelerator = meter, inputs, trainer.accelerator
        wrapped = trainer.model_wrapped
        head = getattr(trainer.model, "get_output_embeddings", lambda: None)()
        self._handles = [wrapped.register_forward_pre_hook(self._forward, with_kwargs=True)]
        self._handles.append((wrapped if head is None else head).register_forward_hook(self._left))
        self._engine = wrapped if trainer.is_deepspeed_enabled else None
        self._accelerator.backward = self._marked(type(self._accelerator).backward.__get__(self._accelerator))
        if self._engine is not None:
            mark_step(self._engine, meter)

    def remove(self) -> None:
        """Take all of it away."""
        for handle in self._handles:
            handle.remove()
        del self._accelerator.backward
        if self._engine is not None:
            del self._engine.step

    def _forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            self._inputs((args, kwargs))
            self._meter.enter("forward")

    def _left(self, module: Any, args: Any, output: Any) -> None:
        if self._meter.phase == "forward":
            self._meter.enter("loss")

    def _marked(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        def marked(loss: Any, **kwargs: Any) -> Any:
            self._meter.enter("backward")
            done = backward(loss, **kwargs)
            if self._engine is None:
                self._meter.enter("step")
            return done

        return marked


class Looking(TrainerCallback):
    """Looks at each step as its stage says and fills `found`; stops the trainer behind the last.

    `outside`: storages that do not belong to the run; `waits`: batches that the proof itself holds.
    """

    def __init__(
        self,
        trainer: Any,
        part_of: Callable[[str], str],
        stages: tuple[Stage, ...],
        found: Measured,
        apart: tuple[Outside, Iterable[Any]],
    ) -> None:
        self._trainer, self._part_of, self._stages, self._found = trainer, part_of, stages, found
        self._outside, self._waits = apart
        self._meter = Meter(torch.device(trainer.args.device))
        self._phases: Phases | None = None
        self._tracker: LiveTensors | None = None
        self._handles: list[Any] = []
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._phases = Phases(self._trainer, self._meter, self._batch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage = self._stages[state.global_step]
        self._meter.measured = self._meter.timed = stage.kind == "plain"
        if stage.kind == "track":
            self._track()
        self._meter.wait()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage = self._stages[state.global_step - 1]
        self._meter.enter("")
        self._meter.wait()
        if stage.kind == "plain" and stage.batch == 0:
            self._found.seconds["whole"] = [time.perf_counter() - self._began]
        if self._tracker is not None:
            self._found.courses.append({"batch": stage.batch} | self._tracked())
        self._meter.timed = False
        control.should_evaluate = control.should_save = control.should_log = False
        control.should_training_stop = state.global_step >= len(self._stages)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        meter, found = self._meter, self._found
        found.seconds |= meter.seconds
        found.peaks = {phase: dataclasses.asdict(peak) for phase, peak in meter.peaks.items() if phase}
        found.process_bytes = held_on_gpu() if meter.device.type == "cuda" else None

    def close(self) -> None:
        """Take every hook away."""
        if self._tracker is not None:
            self._tracked()
        if self._phases is not None:
            self._phases.remove()
            self._phases = None

    def _track(self) -> None:
        trainer, model = self._trainer, self._trainer.model
        tracker = followed(trainer, self._part_of, self._outside, self._waits)
        tracker.begin()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                arrived = functools.partial(_arrived, tracker, self._part_of(name))
                self._handles.append(parameter.register_post_accumulate_grad_hook(arrived))
        self._meter.before_step = self._note_gradients
        self._tracker = self._meter.tracker = tracker
        tracker.__enter__()

    def _note_gradients(self) -> None:
        """Where an engine keeps gradients of its own, they are there when backward has ended."""
        for role, owner, tensor in states_of(self._trainer, self._trainer.model, self._part_of):
            if role == GRADIENTS and self._tracker is not None:
                self._tracker.as_gradient(tensor, owner)

    def _tracked(self) -> dict[str, Any]:
        """Stop following, and say what was seen."""
        tracker, self._tracker, self._meter.tracker = self._tracker, None, None
        self._meter.before_step = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if tracker is None:
            return {}
        tracker.__exit__(None, None, None)
        return course_json(tracker)

    def _batch(self, given: Any) -> None:
        """What is given to the model is the batch; the batch before it waits to go."""
        if self._tracker is not None:
            self._tracker.rename_all("batch", "waiting")
            self._tracker.rename(walk(given), "batch")


def _arrived(tracker: LiveTensors, part: str, parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        tracker.as_gradient(parameter.grad, part)


def outside_of(trainer: Any) -> Outside:
    """The storages that are alive and belong neither to the trainer's model nor to an optimizer."""
    model = trainer.model
    own = [*model.parameters(), *model.buffers(), *(p.ds_tensor for p in model.parameters() if hasattr(p, "ds_tensor"))]
    mine = {_key(local) for tensor in own for local in plain(tensor)}
    return Outside(local for tensor in reachable() for local in plain(tensor) if _key(local) not in mine)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
