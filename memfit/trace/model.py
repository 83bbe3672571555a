"""The model that `build` would make, on fake tensors: real code and shapes, no memory, no weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from memfit.build.arrange import Arranged, Options, arrange
from memfit.build.checkpointing import Contexts, Recompute, checkpointed_layers
from memfit.build.freeze import DTYPES
from memfit.build.load import empty_model
from memfit.catalog.precisions import PRECISIONS
from memfit.families.base import Family
from memfit.planner.parts import ResolvedParts
from memfit.specs.recipe import Recipe
from memfit.trace.delta import use_fla
from memfit.trace.fakes import Fakes
from memfit.trace.flash import use_flash
from memfit.trace.fourbit import to_four_bit, upcast_the_rest
from memfit.trace.fused import liger_loss


def meta_model(family: Family, config: Mapping[str, Any], recipe: Recipe, parts: ResolvedParts) -> Arranged:
    """The model of an effective recipe on the meta device, arranged as `build` does, and its loss."""
    model = empty_model(family, config, attention_name(recipe))
    # PEFT makes its tensors where it is told to; under a fake mode it cannot swap them in.
    with torch.device("meta"):
        arranged = arrange(model, recipe, parts, family, Options(kernel=lambda: liger_loss))
        if recipe.levers.attention == "flash":
            use_flash(arranged.model)
        if recipe.levers.linear_attention == "fla":
            use_fla(arranged.model)
        if parts.quantised:
            to_four_bit(arranged.model, parts.quantised, DTYPES[PRECISIONS[str(recipe.levers.precision)].compute])
            if recipe.lora.kbit_upcast:
                upcast_the_rest(arranged.model)
    arranged.model.train()
    return arranged


def attention_name(recipe: Recipe) -> str:
    """transformers' name of the attention that a traced model is made with; `use_flash` comes after."""
    return "eager" if recipe.levers.attention == "eager" else "sdpa"


def recompute_under(
    model: nn.Module, mode: AbstractContextManager[Any], host: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Checkpointed layers compute again under `mode`: backward itself runs without it (functions called from the
    engine inside an overridden `backward` would not see it). What they keep in host memory goes there under `host`."""

    def contexts(own: Contexts) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        forward, again = own()
        return forward, _both(mode, again)

    for module in checkpointed_layers(model):
        run: Any = module._gradient_checkpointing_func
        around = nullcontext if run.around is nullcontext else host
        again: Any = Recompute(functools.partial(contexts, run.contexts), around)
        module._gradient_checkpointing_func = again


@contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield


def make_fake(model: nn.Module, fakes: Fakes) -> None:
    """Replace every meta parameter and buffer by a fake CPU tensor, in place; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor, parameter: bool) -> torch.Tensor:
        if id(tensor) not in made:
            new = fakes.empty(tensor.size(), tensor.stride(), tensor.dtype)
            made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if parameter else new
        return made[id(tensor)]

    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = fake(value, True)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer, False)
