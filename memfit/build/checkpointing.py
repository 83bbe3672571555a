"""Activation checkpointing per part, set on the layers themselves.

transformers' own switch also hooks the input embedding of every nested model, which gives a frozen vision tower a
graph it does not need (`PreTrainedModel.enable_input_require_grads`). Non-reentrant checkpointing needs no such hook,
so memfit sets the two attributes of each `GradientCheckpointingLayer` and leaves the embeddings alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def set_checkpointing(model: nn.Module, part_of: Callable[[str], str], modes: Mapping[str, str]) -> dict[str, int]:
    """Checkpoint the layers of each part as `modes` says (none | full | every-N); returns layers checkpointed by part.

    A layer in which nothing learns and that feeds nothing that learns keeps no activations anyway; checkpointing it
    is harmless. `every-N` checkpoints layers 0, N, 2N ... of the part.
    """
    recompute = functools.partial(checkpoint, use_reentrant=False)
    seen: dict[str, int] = {}
    done: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, GradientCheckpointingLayer):
            continue
        part = part_of(name)
        index = seen.get(part, 0)
        seen[part] = index + 1
        on = index % _every(modes.get(part, "none")) == 0 if modes.get(part, "none") != "none" else False
        module.gradient_checkpointing = on
        if on:
            module._gradient_checkpointing_func = recompute
            done[part] = done.get(part, 0) + 1
    return done


def _every(mode: str) -> int:
    return 1 if mode == "full" else int(mode.removeprefix("every-"))
