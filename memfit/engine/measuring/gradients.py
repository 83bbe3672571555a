"""Which of the tensors that a step makes are gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memfit.engine.measuring.live import LiveTensors
from memfit.engine.measuring.states import states_of


def note_gradients(tracker: LiveTensors, trainer: Any, model: nn.Module, part_of: Callable[[str], str]) -> None:
    """Where an engine keeps gradients of its own, they are there when backward has ended."""
    for role, owner, tensor in states_of(trainer, model, part_of):
        if role == "gradients":
            tracker.as_gradient(tensor, owner)


def arrival(tracker: LiveTensors, part: str) -> Callable[[torch.Tensor], None]:
    """A hook that tells a tracker of a parameter's gradient when it is there."""

    def note(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            tracker.as_gradient(parameter.grad, part)

    return note
