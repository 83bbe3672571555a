"""DeepSpeed ZeRO, read from its optimizer: what is split, how large each share is, and the sizes of its buffers.

Read for DeepSpeed 0.19.8 (deepspeed.runtime.zero.stage_1_and_2 and stage3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import distributed

from memfit.catalog.precisions import precision_under
from memfit.engine.readback.handles import engine_of_deepspeed, zero_of
from memfit.engine.readback.live import Asked, Live
from memfit.engine.readback.reading import Reading, compared, stated
from memfit.specs.plan import Plan

FIX = "values of zero_optimization decide the bytes that were priced: set them by engine: {zero: ...}, and nowhere else"


def read_12(live: Live, asked: Asked) -> Iterator[Reading]:
    """Stages 1 and 2."""
    optimizer, ranks = zero_of(live), distributed.get_world_size()
    shares = [int(share.numel()) for share in optimizer.single_partition_of_fp32_groups]
    wholes = [int(flat.numel()) for flat in optimizer.bit16_groups_flat]
    learning = sum(p.numel() for group in optimizer.bit16_groups for p in group)
    right = all(share * ranks == whole for share, whole in zip(shares, wholes, strict=True))
    yield Reading(
        "split of the optimizer",
        f"1/{ranks} of {len(wholes)} groups a rank",
        f"1/{ranks} of {len(wholes)} groups a rank" if right else f"shares {shares} of {wholes}",
        right and sum(wholes) >= learning and _own_shards(optimizer.single_partition_of_fp32_groups),
        f"partitions of {sum(shares):,} elements here; {learning:,} learn, {sum(wholes):,} with padding",
        "every rank must belong to the same data-parallel group",
    )
    yield _master(live, asked, optimizer.single_partition_of_fp32_groups)
    numbers = {"reduce_bucket_size": int(optimizer.reduce_bucket_size), "overlap_comm": bool(optimizer.overlap_comm)}
    yield from _values(live, asked, numbers)


def read_3(live: Live, asked: Asked) -> Iterator[Reading]:
    """Stage 3."""
    optimizer, ranks = zero_of(live), distributed.get_world_size()
    parameters = dict(live.model.named_parameters())
    whole = [name for name, p in parameters.items() if not hasattr(p, "ds_id")]
    uneven = [
        name
        for name, p in parameters.items()
        if hasattr(p, "ds_id") and p.ds_tensor.numel() != -(-p.ds_numel // ranks) and p.ds_tensor.numel() != p.ds_numel
    ]
    unsplit = [
        n for n, p in parameters.items() if hasattr(p, "ds_id") and ranks > 1 and p.ds_tensor.numel() == p.ds_numel > 1
    ]
    persistent = [name for name, p in parameters.items() if getattr(p, "ds_persist", False)]
    gathered = [
        n for n, p in parameters.items() if hasattr(p, "ds_id") and p.numel() == p.ds_numel > 0 and n not in persistent
    ]
    wrong = {
        "not split": whole,
        "of another size": uneven,
        "whole on every rank": unsplit,
        "gathered at rest": gathered,
    }
    told = [f"{len(names)} {what} ({names[0]})" for what, names in wrong.items() if names]
    split = f"{len(parameters)} parameters, 1/{ranks} of each a rank"
    yield Reading(
        "zero.Init",
        split,
        split if not told else "; ".join(told),
        not told,
        f"ds_tensor of {sum(hasattr(p, 'ds_id') for p in parameters.values())} parameters holds "
        f"{sum(p.ds_tensor.numel() for p in parameters.values() if hasattr(p, 'ds_id')):,} of "
        f"{sum(getattr(p, 'ds_numel', p.numel()) for p in parameters.values()):,} elements; "
        f"{len(persistent)} small ones stay gathered",
        "make TrainingArguments(deepspeed=...) and join the process group before from_pretrained",
    )
    if live.split_at_load is not None:
        yield Reading(
            "zero.Init while loading",
            "split as they load",
            "split as they load" if live.split_at_load else "loaded whole on every rank, split afterwards",
            live.split_at_load,
            "whether the model's parameters were DeepSpeed's before the engine was made",
            "make TrainingArguments(deepspeed=...) and join the process group before from_pretrained",
        )
    yield _split_states(live, optimizer, ranks)
    yield _master(live, asked, optimizer.fp32_partitioned_groups_flat)
    offload = optimizer.parameter_offload
    numbers = {
        "reduce_bucket_size": int(optimizer.reduce_bucket_size),
        "overlap_comm": bool(engine_of_deepspeed(live).zero_overlap_comm()),
        "sub_group_size": int(optimizer.sub_group_size),
        "stage3_prefetch_bucket_size": int(offload._prefetch_bucket_sz),
        "stage3_max_live_parameters": int(offload._max_available_parameters_in_numel),
        "stage3_max_reuse_distance": int(offload._max_reuse_distance_in_numel),
        "stage3_param_persistence_threshold": int(offload.param_numel_persistence_threshold),
    }
    yield from _values(live, asked, numbers)


def _split_states(live: Live, optimizer: Any, ranks: int) -> Reading:
    learning = [p for group in optimizer.fp16_groups for p in group]
    wanted = sum(-(-int(p.ds_numel) // ranks) for p in learning)
    found = sum(int(flat.numel()) for flat in optimizer.fp32_partitioned_groups_flat)
    return Reading(
        "split of the optimizer",
        f"1/{ranks} of {len(learning)} tensors a rank",
        f"1/{ranks} of {len(learning)} tensors a rank" if wanted == found else f"{found:,} elements",
        wanted == found and _own_shards(optimizer.fp32_partitioned_groups_flat),
        f"fp32_partitioned_groups_flat holds {found:,} elements here, the shares of what learns {wanted:,}",
        "every rank must belong to the same data-parallel group",
    )


def _own_shards(tensors: list[torch.Tensor]) -> bool:
    """Whether the shares hold numbers at all (an emptied tensor would step nothing)."""
    return all(tensor.numel() for tensor in tensors)


def _master(live: Live, asked: Asked, tensors: list[torch.Tensor]) -> Reading:
    """The copy that the optimizer steps."""
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
    devices = ", ".join(sorted({tensor.device.type for tensor in tensors}))
    wanted = None
    if asked.plan is not None:
        row = precision_under(str(asked.plan.recipe.levers.precision), asked.plan.layout.name)
        host = asked.plan.forecast.hardware.gpu is None or asked.plan.layout.home_optimizer == "host"
        wanted = f"{row.master} on {'cpu' if host else 'cuda'}"
    return compared(
        "master weights",
        wanted,
        f"{dtypes} on {devices}",
        f"{sum(t.numel() * t.element_size() for t in tensors):,} B of {len(tensors)} flat copies on this rank",
        "bf16_master_weights_and_grads belongs to pure-bf16 alone, offload_optimizer to levers.offload",
    )


def wanted_values(plan: Plan) -> Mapping[str, Any]:
    """The numbers that the layout was priced with, under DeepSpeed's names."""
    engine = plan.layout.engine
    found: dict[str, Any] = {"reduce_bucket_size": engine.bucket_elements, "overlap_comm": engine.buckets == 2}
    if plan.layout.name == "zero3":
        del found["overlap_comm"]  # no number of the layout depends on it there
        found |= {
            "sub_group_size": engine.step_elements,
            "stage3_prefetch_bucket_size": engine.prefetch_elements,
            "stage3_max_live_parameters": engine.live_elements,
            "stage3_max_reuse_distance": engine.reuse_elements,
            "stage3_param_persistence_threshold": engine.persistent_elements,
        }
    return found


def _values(live: Live, asked: Asked, numbers: Mapping[str, Any]) -> Iterator[Reading]:
    optimizer, engine = zero_of(live), engine_of_deepspeed(live)
    where = f"attributes of {type(optimizer).__name__}"
    if asked.plan is None:
        yield stated("engine.zero", ", ".join(f"{name} {value}" for name, value in numbers.items()), where)
        return
    wanted = wanted_values(asked.plan)
    for name, value in numbers.items():
        if name in wanted:
            yield compared(f"engine.zero.{name}", str(wanted[name]), str(value), where, FIX)
        else:
            yield stated(f"engine.zero.{name}", str(value), where)
    gradients = str(optimizer.gradient_accumulation_dtype).removeprefix("torch.")
    row = precision_under(str(asked.plan.recipe.levers.precision), asked.plan.layout.name)
    yield compared(
        "gradients' dtype (accumulated)",
        row.learning,
        gradients,
        f"gradient_accumulation_dtype of {type(optimizer).__name__}; sent as {engine.communication_data_type}",
        "data_types.grad_accum_dtype of the engine's configuration must be the weights' dtype",
    )


def kept_shares(live: Live) -> list[torch.Tensor]:
    """What the engine keeps of this rank's weights and master weights, where it is kept."""
    optimizer = zero_of(live)
    found: list[torch.Tensor] = []
    if optimizer is not None:
        found += list(getattr(optimizer, "single_partition_of_fp32_groups", []))
        found += list(getattr(optimizer, "fp32_partitioned_groups_flat", []))
        if getattr(optimizer, "offload_param", False):
            found += [p.ds_tensor for p in live.model.parameters() if hasattr(p, "ds_tensor")]
        return found
    from torch.distributed.tensor import DTensor

    return [p.to_local() for p in live.model.parameters() if isinstance(p, DTensor)]


def host_tensors(live: Live) -> list[torch.Tensor]:
    """What lies in host memory for the optimizer: shares, and ZeRO-3's buffer of gradients."""
    buffer = getattr(zero_of(live), "grad_partitions_flat_buffer", None)
    found = [*kept_shares(live), *([buffer] if isinstance(buffer, torch.Tensor) else [])]
    return [tensor for tensor in found if tensor.device.type == "cpu" and tensor.numel()]
