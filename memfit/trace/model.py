"""The model that `build` would make, on fake tensors: real code and shapes, no memory, no weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from memfit.build.arrange import Arranged, Options, arrange
from memfit.build.checkpointing import Contexts, Recompute, checkpointed_layers
from memfit.build.freeze import DTYPES
from memfit.build.load import empty_model
from memfit.build.loss import ChunkedLoss, Loss
from memfit.build.quantise import upcast_the_rest
from memfit.catalog.precisions import PRECISIONS
from memfit.families.base import Family
from memfit.planner.parts import ResolvedParts
from memfit.specs.recipe import Recipe
from memfit.trace.delta import use_fla
from memfit.trace.fakes import Fakes
from memfit.trace.flash import use_flash
from memfit.trace.fourbit import to_four_bit
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
    model: nn.Module,
    modes: Sequence[AbstractContextManager[Any]],
    host: Callable[[], AbstractContextManager[Any]] | None,
    keep: Callable[[nn.Module], Any],
) -> None:
    """Checkpointed layers compute again under `modes`: backward itself runs without them (functions called from the
    engine inside an overridden `backward` would not see them). What they keep in host memory goes there under `host`,
    None where the device is the host. `keep(layer)` gives what checkpointing holds for each call beside the graph."""

    def contexts(layer: nn.Module, own: Contexts) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        forward, again = own()
        return forward, _Again((*modes, again), functools.partial(keep, layer))

    for module in checkpointed_layers(model):
        run: Any = module._gradient_checkpointing_func
        around = run.around if run.around is nullcontext or host is None else host
        again: Any = Recompute(functools.partial(contexts, module, run.contexts), around)
        module._gradient_checkpointing_func = again


def recomputed_loss(loss: Loss, modes: Sequence[AbstractContextManager[Any]]) -> Loss:
    """The loss that computes its chunks again under `modes`; one that computes nothing again stays as it is."""
    if not isinstance(loss, ChunkedLoss):
        return loss
    return dataclasses.replace(loss, contexts=lambda: (nullcontext(), _Again(modes, lambda: None)))


class _Again:
    """Around the second forward of one call. It lives as long as the state of the generators that
    torch.utils.checkpoint:checkpoint keeps for the call, and makes the one that fork_rng holds meanwhile."""

    def __init__(self, contexts: Sequence[AbstractContextManager[Any]], keep: Callable[[], Any]) -> None:
        self._contexts, self._keep = contexts, keep
        self._kept, self._forked, self._stack = keep(), None, ExitStack()

    def __enter__(self) -> None:
        self._forked = self._keep()
        for context in self._contexts:
            self._stack.enter_context(context)

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        self._forked = None


def make_fake(model: nn.Module, fakes: Fakes) -> None:
    """Replace every meta parameter and buffer by a fake CPU tensor, in place; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor, parameter: bool) -> torch.Tensor:
        if id(tensor) not in made:
            new: Any = fakes.empty(tensor.size(), tensor.stride(), tensor.dtype)
            if parameter:
                # What nn.Parameter(new) makes of a tensor of another class, without an operator for each.
                new.requires_grad_(tensor.requires_grad)._is_param = True
            made[id(tensor)] = new
        return made[id(tensor)]

    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = fake(value, True)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer, False)
