"""One rank reads the checkpoint, the others wait with a shell of the model: names and shapes, no weights in memory.

FSDP2's ranks get their shards from the first one while accelerate splits the model
(accelerate.utils.fsdp_utils:fsdp2_load_full_state_dict). Under ZeRO-3 transformers does the like itself.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import distributed, nn

from memfit.specs.recipe import Recipe


def spreads(recipe: Recipe) -> bool:
    """Whether the ranks of this run get their weights from the first one."""
    return recipe.levers.parallel == "fsdp" and distributed.is_initialized() and distributed.get_world_size() > 1


def is_shell(recipe: Recipe) -> bool:
    """Whether this rank reads no weights."""
    return spreads(recipe) and distributed.get_rank() > 0


def where_made(recipe: Recipe) -> AbstractContextManager[Any]:
    """Where new tensors of the model, adapters say, belong on this rank."""
    return torch.device("meta") if is_shell(recipe) else nullcontext()


def fill_shell(model: nn.Module, recipe: Recipe) -> None:
    """After a model was arranged, on every rank: shells get room that nothing has touched, so that no page of it is
    taken, and the buffers that no checkpoint holds.

    TypeError for a model with buffers in its checkpoint, which accelerate cannot spread.
    """
    if not spreads(recipe):
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


def persistent_buffers(model: nn.Module) -> list[str]:
    """Names of buffers that are saved with the weights."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [name for name in model.state_dict(keep_vars=True) if name not in parameters]
