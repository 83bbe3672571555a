"""Activation checkpointing per part, set on the layers themselves.

transformers' own switch also hooks the input embedding of every nested model, which gives a frozen vision tower a
graph it does not need (`PreTrainedModel.enable_input_require_grads`). Non-reentrant checkpointing needs no such hook,
so memfit sets the two attributes of each `GradientCheckpointingLayer` and leaves the embeddings alone. Modules that
are no such layer (mergers, resamplers, projectors) keep what they compute, whatever the mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn
from transformers.modeling_layers import GradientCheckpointingLayer

from memfit.specs.recipe import Recipe

PARTS = ("vision", "connector", "language")
# What `selective` keeps beside a layer's inputs: products with weights, and attention. All else is cheap to compute
# again (norms, activations, rotations, dropout), or grows with the square of the length (eager attention's bmm).
SAVED = frozenset(
    {
        *("aten::mm", "aten::addmm"),
        *("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention"),
        *("aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        # FlashAttention's own package registers these from 2.7 on; older ones hide from the dispatcher and run again.
        "aten::_flash_attention_forward",
        *("flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward"),
    }
)
# () -> (what runs around the forward, what runs around the second forward)
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def checkpointing_modes(recipe: Recipe) -> Mapping[str, str]:
    """The recipe's checkpointing by part, as `set_checkpointing` takes it."""
    chosen = recipe.levers.checkpointing
    return chosen if isinstance(chosen, Mapping) else dict.fromkeys(PARTS, chosen)


def saved_on_host() -> AbstractContextManager[Any]:
    """What autograd saves inside goes to page-locked host memory and comes back in backward."""
    return save_on_cpu(pin_memory=True)


@dataclass(frozen=True)
class Recompute:
    """Runs a layer so that backward computes it again. `around` is entered for what the layer keeps, its inputs."""

    contexts: Contexts = noop_context_fn
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        with self.around():
            return checkpoint(function, *args, use_reentrant=False, context_fn=self.contexts)


def set_checkpointing(
    model: nn.Module, part_of: Callable[[str], str], modes: Mapping[str, str], offload: bool = False
) -> dict[str, int]:
    """Checkpoint the layers of each part as `modes` says (none | full | selective | every-N); returns layers
    checkpointed by part. With `offload` the inputs of checkpointed layers wait in host memory.

    A layer in which nothing learns and that feeds nothing that learns keeps no activations anyway; checkpointing it
    is harmless. `every-N` checkpoints layers 0, N, 2N ... of the part.
    """
    seen: dict[str, int] = {}
    done: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, GradientCheckpointingLayer):
            continue
        part = part_of(name)
        index = seen.get(part, 0)
        seen[part] = index + 1
        mode = modes.get(part, "none")
        on = mode != "none" and index % _every(mode) == 0
        module.gradient_checkpointing = on
        if on:
            contexts = selective_contexts if mode == "selective" else noop_context_fn
            module._gradient_checkpointing_func = Recompute(contexts, saved_on_host if offload else nullcontext)
            done[part] = done.get(part, 0) + 1
    return done


def wrapped_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of every part: what is checkpointed, and what FSDP2 gathers, one at a time."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that are computed again in backward."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]


def selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """torch's selective activation checkpointing with the list `SAVED`."""
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(_policy)
    return contexts


def _policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    schema = getattr(func, "_schema", None)
    saved = schema is not None and schema.name in SAVED
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def _every(mode: str) -> int:
    return int(mode.removeprefix("every-")) if mode.startswith("every-") else 1
