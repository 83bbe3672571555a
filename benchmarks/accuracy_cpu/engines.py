"""The engines of the grid, driven by hand: one process, or one of two ranks under DDP, DeepSpeed or FSDP2.

DeepSpeed and torch.distributed are asked directly, with every value said outright, so that what is measured is
upstream's doing and not that of a trainer in between.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from benchmarks.accuracy_cpu.grid import Cell
from memfit.catalog.optimizers import rounds_by_chance
from memfit.engine.stochastic import StochasticAdamW

RATE = 1e-4
Roles = Mapping[str, list[torch.Tensor]]


class Engine(Protocol):
    """A model that can be stepped. `states()`: role -> live tensors, between the steps and after backward.

    `gathered()`: parameters that are whole for the moment and no states.
    """

    forward: Callable[..., Any]

    def backward(self, loss: torch.Tensor) -> None: ...
    def step(self) -> None: ...
    def states(self) -> Roles: ...
    def gathered(self) -> list[torch.Tensor]: ...


class Plain:
    """One process, as transformers' Trainer steps it: clip, AdamW, gradients set to None."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None, cell: Cell) -> None:
        self.model = model
        self.forward = _forward(model, autocast)
        self.optimizer = _adamw(model, cell)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(_learning(self.model), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def states(self) -> Roles:
        optimizer = [value for state in self.optimizer.state.values() for value in state.values()]
        return {
            "weights": [_local(p) for p in self.model.parameters()],
            "optimizer": [_local(value) for value in optimizer if isinstance(value, torch.Tensor)],
            "gradients": [_local(p.grad) for p in self.model.parameters() if p.grad is not None],
        }

    def gathered(self) -> list[torch.Tensor]:
        return []


class DataParallel(Plain):
    """torch's DistributedDataParallel with its default buckets; unused parameters looked for as Trainer does."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None, cell: Cell) -> None:
        super().__init__(model, autocast, cell)
        unused = cell.checkpointing == "none"
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
        self.forward = _forward(wrapped, autocast)


class FullyShard(Plain):
    """FSDP2: every checkpointable block and the root are units; fp32 shards under 16-bit compute."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None, cell: Cell) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
        from transformers.modeling_layers import GradientCheckpointingLayer

        low = cell.precision in ("bf16-mixed", "bf16-amp")
        if low:
            for parameter in _learning(model):
                parameter.data = parameter.data.float()
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if low else MixedPrecisionPolicy()
        offload = CPUOffloadPolicy(pin_memory=False) if cell.offload != "none" else OffloadPolicy()
        for module in [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]:
            fully_shard(module, mp_policy=policy, offload_policy=offload)
        fully_shard(model, mp_policy=policy, offload_policy=offload)
        super().__init__(model, autocast, cell)

    def gathered(self) -> list[torch.Tensor]:
        return [parameter for parameter in self.model.parameters() if not hasattr(parameter, "_local_tensor")]


class DeepSpeed:
    """deepspeed.initialize with `values` as its configuration."""

    def __init__(self, model: nn.Module, cell: Cell, values: dict[str, Any]) -> None:
        import deepspeed
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        learning = _learning(model)
        optimizer: torch.optim.Optimizer
        if cell.offload == "none":
            optimizer = _adamw(model, cell)
        else:
            more = {"fp32_optimizer_states": False} if cell.precision == "pure-bf16" else {}
            optimizer = DeepSpeedCPUAdam(learning, lr=RATE, weight_decay=0.0, **more)
        self.engine = deepspeed.initialize(model=model, optimizer=optimizer, config=values)[0]
        self.forward = self.engine
        self.model = model

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        self.engine.step()

    def states(self) -> Roles:
        zero = self.engine.optimizer
        weights = [p.data for p in self.model.parameters()]
        weights += [p.ds_tensor.data for p in self.model.parameters() if hasattr(p, "ds_tensor")]
        for name in ("fp16_partitioned_groups_flat", "bit16_groups_flat"):
            weights += _tensors(getattr(zero, name, None))
        master = _tensors(getattr(zero, "single_partition_of_fp32_groups", None))
        master += _tensors(getattr(zero, "fp32_partitioned_groups_flat", None))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        gradients += _tensors(getattr(zero, "averaged_gradients", None))
        gradients += _tensors(getattr(zero, "grad_partitions_flat_buffer", None))
        gradients += [tensor.grad for tensor in master if tensor.grad is not None]
        optimizer = _tensors(dict(zero.optimizer.state))
        return {"gradients": gradients, "weights": weights, "master": master, "optimizer": optimizer}

    def gathered(self) -> list[torch.Tensor]:
        return [p.data for p in self.model.parameters() if hasattr(p, "ds_tensor")]


def make_engine(cell: Cell, model: nn.Module, autocast: torch.dtype | None, values: dict[str, Any]) -> Engine:
    """The engine of a cell; on two ranks the process group must be there. `values`: DeepSpeed's configuration."""
    if cell.parallel == "none":
        return Plain(model, autocast, cell)
    if cell.parallel == "ddp":
        return DataParallel(model, autocast, cell)
    if cell.parallel == "fsdp":
        return FullyShard(model, autocast, cell)
    return DeepSpeed(model, cell, values)


def start_group(rank: int, ranks: int, meeting: Path) -> None:
    """A gloo group over a file, so that no port is taken."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)


def deepspeed_values(cell: Cell) -> dict[str, Any]:
    """DeepSpeed's configuration, every value that moves bytes said outright."""
    zero: dict[str, Any] = {
        "stage": int(cell.parallel.removeprefix("zero")),
        "reduce_bucket_size": cell.reduce_bucket or int(5e8),
        "overlap_comm": False,
        "contiguous_gradients": True,
    }
    if cell.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if cell.offload == "params+optimizer":
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    if cell.precision != "fp32":
        pure = cell.precision == "pure-bf16"
        values["bf16"] = {"enabled": True, "bf16_master_weights_and_grads": pure, "bf16_optimizer_states": pure}
    return values


def _forward(model: nn.Module, autocast: torch.dtype | None) -> Callable[..., Any]:
    """As accelerate prepares it: under autocast the outputs come back in fp32."""
    from accelerate.utils.operations import convert_outputs_to_fp32

    if autocast is None:
        return model

    def forward(**inputs: Any) -> Any:
        with torch.autocast("cpu", dtype=autocast):
            return model(**inputs)

    wrapped: Callable[..., Any] = convert_outputs_to_fp32(forward)
    return wrapped


def _adamw(model: nn.Module, cell: Cell) -> torch.optim.Optimizer:
    """torch's fused AdamW, or memfit's own where it rounds by chance."""
    if rounds_by_chance("adamw", cell.precision):
        return StochasticAdamW(_learning(model), lr=RATE, weight_decay=0.0)
    return torch.optim.AdamW(_learning(model), lr=RATE, weight_decay=0.0, fused=True)


def _learning(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def _tensors(value: Any) -> list[torch.Tensor]:
    return list(_walk(value))


def _walk(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _walk(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _walk(item)
