"""The weights of a live model whole, on the first rank, one tensor at a time, wherever their shards live."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from memfit.engine.ranks import is_first


def whole_state(
    model: nn.Module, wanted: Callable[[str], bool] = lambda name: True, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The named weights and buffers, whole, on the first rank; an empty mapping on the others. All ranks must call.

    `wanted` chooses by name; `dtype` casts floating tensors as they come. Where nothing is split the tensors are the
    model's own, not copies. Tied weights stay one tensor.
    """
    seen: dict[int, torch.Tensor | None] = {}  # on every rank: a tied tensor that one rank gathers twice is a hang
    state = {}
    for name, tensor in _named(model):
        if not wanted(name):
            continue
        if id(tensor) not in seen:
            whole = _whole(tensor)
            cast = whole is not None and dtype is not None and whole.is_floating_point()
            seen[id(tensor)] = whole.to(dtype) if whole is not None and cast else whole
        found = seen[id(tensor)]
        if found is not None:
            state[name] = found
    return state


def is_split(model: nn.Module) -> bool:
    """Whether some parameter lives in shards."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def _named(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers by the names of the state dict, tied ones under each name."""
    yield from model.state_dict(keep_vars=True).items()


def _whole(tensor: torch.Tensor) -> torch.Tensor | None:
    """The whole tensor on the first rank, None on the others. A collective where the tensor is split."""
    if isinstance(tensor, DTensor):
        gathered = tensor.detach().full_tensor()
        return gathered.cpu() if is_first() else None
    if hasattr(tensor, "ds_id"):
        return _whole_of_zero3(tensor)
    return tensor.detach() if is_first() else None


def _whole_of_zero3(parameter: Any) -> torch.Tensor | None:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        # A copy: the gathered tensor goes when the context ends.
        return parameter.detach().cpu().clone() if is_first() else None
