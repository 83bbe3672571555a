"""The weights of a live model whole, on the first rank, one tensor at a time, wherever their shards live."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from memfit.engine.ranks import is_first

ON_DISK_FROM = 1 << 20  # bytes: smaller tensors are not worth a file


def whole_state(
    model: nn.Module,
    wanted: Callable[[str], bool] = lambda name: True,
    dtype: torch.dtype | None = None,
    folder: Path | None = None,
) -> dict[str, torch.Tensor]:
    """The named weights and buffers, whole, on the first rank; an empty mapping on the others. All ranks must call.

    `wanted` chooses by name; `dtype` casts floating tensors as they come. Where nothing is split and the model is in
    host memory the tensors are the model's own, not copies. Tied weights stay one tensor. Where shards are in host
    memory the whole would be a second model there: it is gathered into files of `folder` that the kernel may drop from
    memory, and that go with it.
    """
    seen: dict[int, torch.Tensor | None] = {}  # on every rank: a tied tensor that one rank gathers twice is a hang
    state = {}
    for name, tensor in _named(model):
        if not wanted(name):
            continue
        if id(tensor) not in seen:
            seen[id(tensor)] = _whole(tensor, dtype if tensor.is_floating_point() else None, folder)
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


def _whole(tensor: torch.Tensor, dtype: torch.dtype | None, folder: Path | None) -> torch.Tensor | None:
    """The whole tensor on the first rank, None on the others. A collective where the tensor is split."""
    if isinstance(tensor, DTensor):
        on_host = tensor.to_local().device.type == "cpu"
        gathered = tensor.detach().full_tensor()
        return _kept(gathered, dtype, folder if on_host else None) if is_first() else None
    if hasattr(tensor, "ds_id"):
        return _whole_of_zero3(tensor, dtype, folder)
    # In host memory, where it is written from: a GPU has no room for a second model.
    return tensor.detach().to("cpu", dtype or tensor.dtype) if is_first() else None


def _whole_of_zero3(parameter: Any, dtype: torch.dtype | None, folder: Path | None) -> torch.Tensor | None:
    import deepspeed

    on_host = parameter.ds_tensor.device.type == "cpu"
    with deepspeed.zero.GatheredParameters([parameter]):
        # A copy: the gathered tensor goes when the context ends.
        return _kept(parameter.detach(), dtype, folder if on_host else None) if is_first() else None


def _kept(whole: torch.Tensor, dtype: torch.dtype | None, folder: Path | None) -> torch.Tensor:
    """A copy in host memory, or in a file of `folder` where one can be made there."""
    dtype = dtype or whole.dtype
    size = whole.numel() * dtype.itemsize
    made = _mapped(whole.shape, dtype, folder) if folder is not None and size >= ON_DISK_FROM else None
    if made is None:
        made = torch.empty(whole.shape, dtype=dtype)
    return made.copy_(whole)


def _mapped(shape: torch.Size, dtype: torch.dtype, folder: Path) -> torch.Tensor | None:
    """An empty tensor in a file without a name, whose room on disk is sure; None where there is none."""
    path = folder / f".gathered-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shape.numel() * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=shape.numel(), dtype=dtype).view(shape)
    except (OSError, RuntimeError, AttributeError):  # a full disk, or one that maps no files: memory will do
        return None
    finally:
        path.unlink(missing_ok=True)
