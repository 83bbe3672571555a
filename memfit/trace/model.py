"""The model that `build` would make, on fake tensors: real code and shapes, no memory, no weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from memfit.build.adapters import add_adapters, base_name, is_adapter
from memfit.build.checkpointing import set_checkpointing
from memfit.build.freeze import set_dtypes, set_learning
from memfit.build.load import empty_model
from memfit.catalog.precisions import PRECISIONS
from memfit.families.base import Family
from memfit.planner.parts import ResolvedParts
from memfit.specs.recipe import Recipe

PARTS = ("vision", "connector", "language")


def meta_model(family: Family, config: Mapping[str, Any], recipe: Recipe, parts: ResolvedParts) -> nn.Module:
    """The model of an effective recipe on the meta device, by the steps of `build` in their order."""
    model = empty_model(family, config, attention_name(recipe))
    if parts.lora_modules:
        # PEFT makes its tensors where it is told to; under a fake mode it cannot swap them in.
        with torch.device("meta"):
            model = add_adapters(model, recipe.lora, parts.lora_modules)
    set_learning(model, lambda name: is_adapter(name) or base_name(name) in parts.learning)
    precision = PRECISIONS[str(recipe.levers.precision)]
    set_dtypes(model, precision.learning, precision.frozen, keep=is_adapter)
    set_checkpointing(model, lambda name: family.part_of(base_name(name)), checkpointing_modes(recipe))
    return model.train()


def attention_name(recipe: Recipe) -> str:
    """transformers' name of the attention that is traced. Flash keeps what sdpa's flash kernel keeps, and sdpa runs
    on a machine without it."""
    return "eager" if recipe.levers.attention == "eager" else "sdpa"


def checkpointing_modes(recipe: Recipe) -> Mapping[str, str]:
    """The recipe's checkpointing by part, as `set_checkpointing` takes it."""
    chosen = recipe.levers.checkpointing
    return chosen if isinstance(chosen, Mapping) else dict.fromkeys(PARTS, chosen)


def recompute_under(model: nn.Module, mode: AbstractContextManager[Any]) -> None:
    """Checkpointed layers compute again under `mode`: backward itself runs without it (functions called from the
    engine inside an overridden `backward` would not see it)."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            module._gradient_checkpointing_func = functools.partial(
                checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), mode)
            )


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every meta parameter and buffer by a fake CPU tensor, in place; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor, parameter: bool) -> torch.Tensor:
        if id(tensor) not in made:
            with mode:
                new = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
                made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if parameter else new
        return made[id(tensor)]

    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = fake(value, True)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer, False)
