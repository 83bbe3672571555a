"""The states of a trainer that is prepared, as live tensors with their role: weights, gradients, moments, buffers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

Named = tuple[str, str, torch.Tensor]  # role, owner (a part, or where an engine keeps it), tensor
DEEP = 4  # objects of an engine inside each other that are looked into
# Where DeepSpeed keeps what (deepspeed.runtime.zero.stage_1_and_2, stage3): the flat groups behind the parameters.
_FLAT_WEIGHTS = ("fp16_partitioned_groups_flat", "bit16_groups_flat", "parallel_partitioned_bit16_groups")
_FLAT_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
_FLAT_GRADIENTS = ("averaged_gradients", "grad_partitions_flat_buffer")


def states_of(trainer: Any, model: nn.Module, part_of: Callable[[str], str]) -> Iterator[Named]:
    """Every state that this rank holds, the clearest word about a storage first."""
    parts = {id(parameter): part_of(name) for name, parameter in model.named_parameters()}
    zero = getattr(trainer.model_wrapped, "optimizer", None) if trainer.is_deepspeed_enabled else None
    for parameter in model.parameters():
        if parameter.grad is not None:
            yield "gradients", parts[id(parameter)], parameter.grad
    if zero is not None:
        yield from _of_zero(zero)
    for parameter in model.parameters():
        if hasattr(parameter, "ds_tensor"):
            yield "weights", parts[id(parameter)], parameter.ds_tensor
            yield "gathered", parts[id(parameter)], parameter.data
        else:
            yield "weights", parts[id(parameter)], parameter
    for buffer in model.buffers():
        yield "buffers", "model", buffer
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if zero is None and inner is not None:
        for parameter, state in inner.state.items():
            for tensor in walk(state):
                yield "optimizer", parts.get(id(parameter), ""), tensor
    if zero is not None:
        for name, value in (*vars(zero).items(), *vars(trainer.model_wrapped).items()):
            for tensor in _inside(value, DEEP, set()):
                yield "engine", name.strip("_"), tensor
    for module in model.modules():
        yield from _of_fsdp(module)


def names_of(trainer: Any, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameter that a state belongs to: its own name, or that with the name of the optimizer's state behind it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        yield name, getattr(parameter, "ds_tensor", parameter)
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    for parameter, state in getattr(inner, "state", {}).items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and id(parameter) in names:
                yield f"{names[id(parameter)]} ({key})", value


def waiting_batches() -> list[torch.Tensor]:
    """The micro-batches that the loop holds in host memory, read from its own frame.

    transformers.Trainer._run_epoch keeps them as `batch_samples`; empty where no such frame is above the caller.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_run_epoch" and "batch_samples" in frame.f_locals:
            return list(walk(frame.f_locals["batch_samples"]))
        frame = frame.f_back  # type: ignore[assignment]
    return []


def walk(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists, tuples and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from walk(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from walk(item)


def _of_zero(zero: Any) -> Iterator[Named]:
    for names, role in ((_FLAT_GRADIENTS, "gradients"), (_FLAT_MASTERS, "master"), (_FLAT_WEIGHTS, "weights")):
        for name in names:
            for tensor in walk(getattr(zero, name, None)):
                yield role, "", tensor
                if role == "master" and tensor.grad is not None:
                    yield "gradients", "", tensor.grad
    states = getattr(getattr(zero, "optimizer", zero), "state", {})
    for tensor in walk(dict(states)):
        yield "optimizer", "", tensor


def _of_fsdp(module: nn.Module) -> Iterator[Named]:
    """What FSDP2 gathers into: storages that it empties and fills again (torch.distributed.fsdp FSDPParam)."""
    state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    for group in groups:
        for parameter in getattr(group, "fsdp_params", ()):
            for name in ("_unsharded_param", "all_gather_outputs", "_unsharded_inner_tensors"):
                for tensor in walk(getattr(parameter, name, None)):
                    yield "gathered", "", tensor


def _inside(value: Any, deep: int, seen: set[int]) -> Iterator[torch.Tensor]:
    """Tensors in containers and in DeepSpeed's own objects, each once."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if deep == 0 or id(value) in seen or isinstance(value, nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        items: Any = value.values()
    elif isinstance(value, list | tuple | set):
        items = value
    elif type(value).__module__.startswith("deepspeed") and hasattr(value, "__dict__"):
        items = vars(value).values()
    else:
        return
    for item in list(items):
        yield from _inside(item, deep - 1, seen)
