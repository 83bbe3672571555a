"""Trace equal blocks once: one of each kind between like neighbours runs, the others are written into the events.

A deep model spends its trace on blocks that do the same. `plan_skips` looks at what every block is called with and
picks those that run (`folds`); `unfold` copies their events for those left out, storage by storage. Where blocks of one
kind turn out not to be alike, `unfold` says so and the caller traces the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memfit.families.names import Where
from memfit.trace.folds import Fold, fold_of

SMALL = 4096  # numbers of a tensor that count as part of a block's call


@contextmanager
def left_out(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within, these blocks hand their hidden states through."""
    for block in blocks:
        block.forward = _through
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def is_left_out(block: nn.Module) -> bool:
    """Whether a block hands its hidden states through at this moment."""
    return vars(block).get("forward") is _through


def _through(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    return hidden_states


def blocks_of(model: nn.Module, locate: Callable[[str], Where]) -> dict[Where, nn.Module]:
    """The numbered blocks of every part: the outermost module with that number."""
    found: dict[Where, nn.Module] = {}
    for name, module in model.named_modules():
        where = locate(name)
        if where[1] is not None and where not in found:
            found[where] = module
    return found


def plan_skips(blocks: dict[Where, nn.Module], run_forward: Callable[[], Any]) -> tuple[Fold, ...]:
    """Which blocks to leave out. `run_forward` runs the model's forward once, here with no block doing anything."""
    calls: dict[Where, Any] = {}
    handles = [
        block.register_forward_pre_hook(_noting(where, calls, block), with_kwargs=True)
        for where, block in blocks.items()
    ]
    try:
        with left_out(list(blocks.values())), torch.no_grad():
            run_forward()
    finally:
        for handle in handles:
            handle.remove()
    folds = []
    for part in dict.fromkeys(part for part, _ in blocks):
        count = sum(name == part for name, _ in blocks)
        folds.append(fold_of(part, [calls.get((part, number), number) for number in range(count)]))
    return tuple(fold for fold in folds if fold is not None)


def _noting(where: Where, calls: dict[Where, Any], block: nn.Module) -> Callable[..., None]:
    parameters = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters())
    kinds = tuple(type(module) for module in block.modules())
    on = getattr(block, "gradient_checkpointing", None)

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls[where] = (parameters, kinds, on, _described(args), _described(tuple(sorted(kwargs.items()))))

    return note


def _described(value: Any) -> Any:
    """What matters of an argument: shapes, and the numbers of small integer tensors."""
    if isinstance(value, torch.Tensor):
        numbers: Any = ()
        if not isinstance(value, FakeTensor) and value.numel() <= SMALL:
            numbers = tuple(value.flatten().tolist())
        return tuple(value.shape), value.dtype, value.requires_grad, numbers
    if isinstance(value, tuple | list):
        return tuple(_described(item) for item in value)
    return value if isinstance(value, str | int | float | bool | None) else type(value)
