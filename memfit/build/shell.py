"""One rank reads the checkpoint, the others wait with a shell of the model: names and shapes, no weights in memory.

FSDP2's ranks get their shards from the first one while accelerate splits the model
(accelerate.utils.fsdp_utils:fsdp2_load_full_state_dict). Under ZeRO-3 transformers does the like itself. Where every
rank keeps the whole model, it goes from the first one's device to the others' here, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import distributed, nn

from memfit.catalog.methods import METHODS
from memfit.inputs.processes import rank_facts
from memfit.specs.recipe import Recipe

WHOLE = frozenset({"ddp", "zero1", "zero2"})  # every rank keeps all weights
# (name, dtype, shape) of every tensor of a model
Listing = list[tuple[str, torch.dtype, tuple[int, ...]]]


def spreads(recipe: Recipe) -> bool:
    """Whether the ranks of this run get their weights from the first one. Weights in 4 bit are no tensors alone: each
    rank packs its own, straight from the file to its device (`memfit.build.quantise`)."""
    several = distributed.is_initialized() and distributed.get_world_size() > 1
    return several and recipe.levers.parallel in {*WHOLE, "fsdp"} and METHODS[recipe.method].quant is None


def is_shell(recipe: Recipe) -> bool:
    """Whether this rank reads no weights."""
    return spreads(recipe) and distributed.get_rank() > 0


@contextmanager
def in_turn(recipe: Recipe, ranks_of_machine: int) -> Iterator[None]:
    """Where each rank reads the checkpoint itself, the ranks of a machine do so one after another: host memory then
    holds one copy at a time."""
    several = distributed.is_initialized() and distributed.get_world_size() > 1
    waits = several and METHODS[recipe.method].quant is not None
    turn = rank_facts().local_rank
    for _ in range(turn if waits else 0):
        distributed.barrier()
    yield
    for _ in range(ranks_of_machine - turn if waits else 0):
        distributed.barrier()


def where_made(recipe: Recipe) -> AbstractContextManager[Any]:
    """Where new tensors of the model, adapters say, belong on this rank."""
    return torch.device("meta") if is_shell(recipe) else nullcontext()


def fill_shell(model: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """After a model was arranged, on every rank. Where each keeps the whole model it is on `device` after this. Under
    FSDP2 shells get room that nothing has touched, so that no page of it is taken, and the buffers that no checkpoint
    holds.

    TypeError for a model with buffers in its checkpoint, which accelerate cannot spread.
    """
    if not spreads(recipe):
        return
    if recipe.levers.parallel in WHOLE:
        _hand_over(model, device)
        return
    kept = persistent_buffers(model)
    if kept:
        raise TypeError(f"buffers in the checkpoint cannot be spread over ranks: {', '.join(kept)}")
    if is_shell(recipe):
        # accelerate tells the optimizer's parameters apart by their addresses: on the meta device all are 0.
        model.to_empty(device="cpu")
        model.tie_weights()
    with torch.no_grad():
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)


def _hand_over(model: nn.Module, device: torch.device) -> None:
    """Every tensor of the first rank's model on every rank's device; host memory holds the first rank's alone."""
    first = distributed.get_rank() == 0
    if first:
        model.to(device)
    else:
        model.to_empty(device=device)
        model.tie_weights()
    told: list[Listing] = [_listing(model)]
    distributed.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    if [row[::2] for row in told[0]] != [row[::2] for row in _listing(model)]:
        raise RuntimeError("the ranks have built models of different tensors")
    named = dict(_tensors(model))
    with torch.no_grad():
        for name, dtype, _ in told[0]:
            tensor = named[name]
            if tensor.dtype != dtype:  # a buffer follows the dtype it was made under, which loading knows better
                tensor.data = torch.empty_like(tensor, dtype=dtype)
            if not tensor.is_contiguous():
                tensor.data = tensor.data.contiguous()
            # As bytes: gloo does not take every dtype.
            distributed.broadcast(tensor.data.view(-1).view(torch.uint8), src=0)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, tied ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _listing(model: nn.Module) -> Listing:
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in _tensors(model)]


def persistent_buffers(model: nn.Module) -> list[str]:
    """Names of buffers that are saved with the weights."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [name for name in model.state_dict(keep_vars=True) if name not in parameters]
