"""All that a few steps may touch of a user's trainer, kept before them and put back after, bit for bit.

Weights that learn are copied to host memory; all are where an engine puts others in their place. Split weights are
copied share by share, so that each rank keeps what it holds and no more.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState
from torch import nn

DEEP = 4  # containers inside each other that are kept: optimizer groups, sections of a DeepSpeed configuration
SPLIT = "ds_tensor"  # this rank's share of a parameter (deepspeed.runtime.zero.partition_parameters)


class Shelf:
    """The attributes of one object and the contents of its plain containers; `restore` puts both back in place."""

    def __init__(self, thing: Any, deep: int = DEEP) -> None:
        self._thing, self._values = thing, dict(vars(thing))
        self._contents = [(value, _content(value, deep)) for value in self._values.values()]

    def restore(self) -> None:
        """As it was, with the same containers."""
        own = vars(self._thing)
        own.clear()
        own.update(self._values)
        for value, content in self._contents:
            _refill(value, content)


def _content(value: Any, deep: int) -> Any:
    """What a dict, list or set holds, and what these hold; None for anything else."""
    if not deep:
        return None
    if isinstance(value, dict):
        return [(key, item, _content(item, deep - 1)) for key, item in value.items()]
    if isinstance(value, list):
        return [(item, _content(item, deep - 1)) for item in value]
    return list(value) if isinstance(value, set) else None


def _refill(value: Any, content: Any) -> None:
    if content is None:
        return
    value.clear()
    if isinstance(value, dict):
        value.update({key: item for key, item, _ in content})
    elif isinstance(value, list):
        value.extend(item for item, _ in content)
    else:
        value.update(content)
        return
    for *_, item, inner in content:
        _refill(item, inner)


@dataclass
class _Weight:
    """One parameter: its tensor where an engine leaves it in place, a copy of its numbers where they may change."""

    parameter: nn.Parameter
    data: torch.Tensor | None
    copy: torch.Tensor | None
    share: Shelf | None
    share_copy: torch.Tensor | None
    device: torch.device
    grad: torch.Tensor | None
    learns: bool
    shelf: Shelf

    def restore(self) -> None:
        parameter = self.parameter
        self.shelf.restore()
        if self.share is not None and self.share_copy is not None:
            self.share.restore()
            share: torch.Tensor = getattr(parameter, SPLIT)
            share.data = self.share_copy.to(self.device)
        if self.data is not None:
            if self.copy is not None:
                self.data.copy_(self.copy)
            parameter.data = self.data
        elif self.copy is not None:
            parameter.data = self.copy.to(self.device)
        parameter.requires_grad_(self.learns)
        parameter.grad = None if self.grad is None else self.grad.to(parameter.device)


class Kept:
    """Model, optimizer, configurations, accelerator and chance of a trainer, as they stand when this is made."""

    def __init__(self, trainer: Any) -> None:
        model: nn.Module = trainer.model
        replaced = _is_replaced(trainer)
        self._trainer = Shelf(trainer, deep=0)
        self._modules = [Shelf(module, deep=1) for module in model.modules()]
        self._shelves = [Shelf(thing) for thing in _others(trainer)]
        self._weights = [_weight(parameter, replaced) for parameter in model.parameters()]
        self._tensors = [(tensor, _on_host(tensor)) for tensor in (*model.buffers(), *_states(trainer.optimizer))]
        self._gradient_state = dict(GradientState._shared_state)
        self._chance = _Chance()

    def restore(self) -> None:
        """Everything as it was. What ran in between must have ended, its engine destroyed."""
        with torch.no_grad():
            self._trainer.restore()
            for shelf in (*self._modules, *self._shelves):
                shelf.restore()
            for weight in self._weights:
                weight.restore()
            for tensor, copy in self._tensors:
                tensor.copy_(copy)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self._gradient_state)
        self._chance.restore()

    @property
    def bytes(self) -> int:
        """Host memory that the copies take on this rank."""
        copies = [copy for weight in self._weights for copy in (weight.copy, weight.share_copy) if copy is not None]
        return sum(copy.nbytes for copy in (*copies, *(copy for _, copy in self._tensors)))


def _is_replaced(trainer: Any) -> bool:
    """Whether an engine puts other tensors in the parameters' place: DeepSpeed does, and accelerate on CPU ranks, which
    moves the model from "cpu" to "cpu:0" (accelerate.accelerator:Accelerator.prepare_model), a copy to torch."""
    several = int(trainer.args.world_size) > 1
    return bool(trainer.is_deepspeed_enabled) or (several and trainer.args.device.type == "cpu")


class _Chance:
    """The states of every generator that training draws from."""

    def __init__(self) -> None:
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)


def _weight(parameter: nn.Parameter, replaced: bool) -> _Weight:
    share = getattr(parameter, SPLIT, None)
    copied = share is None and (replaced or parameter.requires_grad)
    return _Weight(
        parameter=parameter,
        data=None if replaced and share is None else parameter.data,
        copy=_on_host(parameter) if copied else None,
        share=None if share is None else Shelf(share),
        share_copy=None if share is None else _on_host(share),
        device=(parameter if share is None else share).device,
        grad=None if parameter.grad is None else _on_host(parameter.grad),
        learns=parameter.requires_grad,
        shelf=Shelf(parameter, deep=1),
    )


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor's numbers in host memory."""
    return tensor.detach().to("cpu", copy=True)


def _others(trainer: Any) -> Iterator[Any]:
    """Objects beside the model's modules that training writes into, each once."""
    accelerator, args = trainer.accelerator, trainer.args
    config = getattr(trainer.model, "config", None)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    candidates = (
        accelerator,
        args,
        config,
        getattr(config, "text_config", None),
        getattr(trainer.model, "generation_config", None),
        plugin,
        getattr(plugin, "hf_ds_config", None),
        getattr(args, "hf_deepspeed_config", None),
        getattr(args, "deepspeed_plugin", None),
        getattr(accelerator, "scaler", None),
        *_inside(trainer.optimizer, "optimizer"),
        *_inside(trainer.lr_scheduler, "scheduler"),
    )
    seen: set[int] = set()
    for thing in candidates:
        if thing is not None and hasattr(thing, "__dict__") and id(thing) not in seen:
            seen.add(id(thing))
            yield thing


def _inside(thing: Any, name: str) -> Iterable[Any]:
    """An optimizer or scheduler and what its wrappers wrap."""
    while thing is not None:
        yield thing
        thing = vars(thing).get(name)


def _states(optimizer: Any) -> Iterator[torch.Tensor]:
    """Tensors that an optimizer which the user made holds already."""
    for inner in _inside(optimizer, "optimizer"):
        for state in getattr(inner, "state", {}).values() if isinstance(inner, torch.optim.Optimizer) else ():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
