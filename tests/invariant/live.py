"""What a rank really holds, in bytes, read from the live objects of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from memfit.inputs.processes import rank_facts


class Watch(TrainerCallback):
    """Writes live.RANK.json at every optimizer step; the last one stays. `gradients` is None where the engine has
    already used them up."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / f"live.{rank_facts().rank}.json"
        self._gradients: int | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        self._gradients = sum(local_bytes(gradient) for gradient in found) if found else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        masters: list[torch.Tensor] = []
        partitions: int | None = None
        while hasattr(optimizer, "optimizer"):
            if hasattr(optimizer, "grad_partitions_flat_buffer"):  # ZeRO-3
                size = local_bytes(optimizer.grad_partitions_flat_buffer)
                if optimizer.offload_optimizer:  # the gradients that are stepped lie beside it, gone after the step
                    partitions = size
                else:
                    self._gradients = size
                masters = optimizer.fp32_partitioned_groups_flat
            elif hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO-1 and 2
                masters = optimizer.single_partition_of_fp32_groups
            optimizer = optimizer.optimizer
        moments = [value for one in optimizer.state.values() for value in one.values() if torch.is_tensor(value)]
        own = {storage(getattr(p, "ds_tensor", p)) for p in model.parameters()}
        found = {
            "weights": sum(weight_bytes(p) for p in model.parameters()),
            "gradients": self._gradients,
            "partitions": partitions,
            "optimizer": sum(local_bytes(value) for value in moments),
            "master": sum(local_bytes(p) for p in masters if storage(p) not in own),
        }
        self._file.write_text(json.dumps(found))


def local_bytes(tensor: torch.Tensor) -> int:
    """Bytes of this rank's part of a tensor."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def storage(tensor: torch.Tensor) -> int:
    """Which memory a tensor looks into."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()


def weight_bytes(parameter: nn.Parameter) -> int:
    """Bytes of this rank's part of a parameter, also where DeepSpeed keeps it beside an emptied tensor."""
    part = getattr(parameter, "ds_tensor", None)
    return local_bytes(parameter if part is None else part)
