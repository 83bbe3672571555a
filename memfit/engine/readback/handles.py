"""The engine inside a trainer, found by what its objects are: nothing of an engine is imported for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from memfit.engine.readback.live import Live


def engine_of_deepspeed(live: Live) -> Any:
    """DeepSpeed's engine, None where the model runs without one."""
    wrapped = live.wrapped
    return wrapped if any(kind.__name__ == "DeepSpeedEngine" for kind in type(wrapped).__mro__) else None


def zero_of(live: Live) -> Any:
    """DeepSpeed's ZeRO optimizer, None without ZeRO."""
    optimizer = getattr(engine_of_deepspeed(live), "optimizer", None)
    return optimizer if hasattr(optimizer, "bit16_groups") or hasattr(optimizer, "fp16_groups") else None


def stage_of(live: Live) -> int:
    """ZeRO's stage by what its optimizer does, 0 without ZeRO."""
    zero = zero_of(live)
    if zero is None:
        return 0
    return 3 if hasattr(zero, "parameter_offload") else 2 if zero.partition_gradients else 1


def fsdp_modules(live: Live) -> list[tuple[str, Any]]:
    """(name, module) of the units that FSDP2 gathers by themselves."""
    return [(name, module) for name, module in live.model.named_modules() if isinstance(module, FSDPModule)]


def fsdp_groups(live: Live) -> Iterator[tuple[str, Any]]:
    """(name of the unit, its group of parameters)."""
    for name, module in fsdp_modules(live):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            yield name, group


def parallel_of(live: Live) -> str:
    """The value of `levers.parallel` that the live objects are."""
    if engine_of_deepspeed(live) is not None:
        stage = stage_of(live)
        return f"zero{stage}" if stage else "deepspeed without ZeRO"
    if fsdp_modules(live):
        return "fsdp"
    wrapped: Any = live.wrapped
    if isinstance(wrapped, DistributedDataParallel):
        return "ddp"
    if isinstance(wrapped, DataParallel):
        return "one process for several GPUs (DataParallel)"
    return "layers" if len(set((getattr(live.model, "hf_device_map", None) or {}).values())) > 1 else "none"
