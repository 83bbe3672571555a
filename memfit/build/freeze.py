"""Which parameters learn, and in which dtype each one lives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def set_learning(model: nn.Module, learns: Callable[[str], bool]) -> None:
    """`requires_grad` of every parameter by name; a tied parameter learns if one of its names does."""
    by_storage: dict[int, bool] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in named:
        by_storage[id(parameter)] = by_storage.get(id(parameter), False) or learns(name)
    for _, parameter in named:
        parameter.requires_grad_(by_storage[id(parameter)])


def set_dtypes(
    model: nn.Module, learning: str, frozen: str, keep: Callable[[str], bool], idle: Collection[str] = ()
) -> None:
    """Cast each floating parameter in place: those that learn to one dtype, the frozen ones to the other.

    `idle` names frozen ones that take the dtype of those that learn: what their neighbours hand them has it.
    Names for which `keep` is true stay as they are: adapters have a dtype of their own (`lora.dtype`).
    Values pass through no third dtype, so that a bf16 checkpoint that is trained in fp32 keeps every bit.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not keep(name):
            wanted = DTYPES[learning if parameter.requires_grad or name in idle else frozen]
            if parameter.dtype != wanted:
                parameter.data = parameter.data.to(wanted)


def trainable_by_part(model: nn.Module, part_of: Callable[[str], str]) -> Mapping[str, int]:
    """Parameters that learn, counted once each, by part: read back from the live model."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            counts[part] = counts.get(part, 0) + whole_numel(parameter)
    return counts


def whole_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where DeepSpeed has taken it apart (zero.Init leaves an empty tensor)."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
