"""Trace equal blocks once: the first, one in the middle and the last run, the others are written into the events.

A deep model spends its trace on blocks that do the same. `plan_skips` looks at what every block is called with and
picks the repeats; `unfold` copies the events of the middle one for those left out, storage by storage. Where the kept
blocks turn out not to be alike, `unfold` says so and the caller traces the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memfit.families.names import Where
from memfit.trace.unfold import KEPT, Run

LONGEST_PERIOD = 8  # Qwen3.5 repeats after 4 blocks, Qwen2.5-VL's tower after 8
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


def plan_skips(blocks: dict[Where, nn.Module], run_forward: Callable[[], Any]) -> tuple[Run, ...]:
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
    runs: list[Run] = []
    for part in dict.fromkeys(part for part, _ in blocks):
        count = sum(name == part for name, _ in blocks)
        runs += _runs(part, [calls.get((part, number), number) for number in range(count)])
    return tuple(runs)


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


def _runs(part: str, calls: list[Any]) -> list[Run]:
    """The periods that leave out most blocks; runs do not overlap."""
    best: list[Run] = []
    for length in range(1, LONGEST_PERIOD + 1):
        found, start = [], 0
        while start < len(calls):
            end = start + length
            while end < len(calls) and calls[end] == calls[end - length]:
                end += 1
            count = (end - start) // length
            if count > KEPT:
                found.append(Run(part, start, length, count))
                start += count * length
            else:
                start += 1
        if sum(len(run.skipped) for run in found) > sum(len(run.skipped) for run in best):
            best = found
    return best
