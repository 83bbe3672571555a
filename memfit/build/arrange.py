"""What a recipe does to a model, in the one order: loss head -> adapters -> freeze -> dtypes -> checkpointing.

Training, evaluation, the trace and the benchmarks call `arrange`, each on a model that it got in its own way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from memfit.build.adapters import add_adapters, is_adapter
from memfit.build.checkpointing import checkpointing_modes, set_checkpointing
from memfit.build.everywhere import GATHERS, PICTURE_PARTS, merge_at_once, show_grey_picture
from memfit.build.freeze import DTYPES, set_dtypes, set_learning
from memfit.build.loss import FusedKernel, Loss, liger_kernel, put_head_off
from memfit.build.quantise import upcast_the_rest
from memfit.catalog.precisions import PRECISIONS, precision_under
from memfit.errors import UserError
from memfit.families.base import Family
from memfit.families.names import base_name
from memfit.planner.counting import LORA_DTYPES
from memfit.planner.parts import ResolvedParts
from memfit.specs.recipe import Lora, Recipe
from memfit.strategies import STRATEGIES

COPY = ".modules_to_save."  # in names of parameters (peft.utils.other:ModulesToSaveWrapper)


@dataclass(frozen=True)
class Arranged:
    """A model as its recipe wants it, the loss that goes with it, and the layers that are checkpointed, by part."""

    model: nn.Module
    loss: Loss
    checkpointed: Mapping[str, int]


@dataclass(frozen=True)
class Options:
    """`load` fills weights in once the adapters are there. With `generates` the head always gives logits, for
    evaluation. `kernel` fetches the fused loss. `pack` puts weights into 4 bit, before adapters go beside them."""

    load: Callable[[nn.Module], None] | None = None
    generates: bool = False
    kernel: Callable[[], FusedKernel] = liger_kernel
    pack: Callable[[nn.Module], None] | None = None


def arrange(
    model: nn.Module, recipe: Recipe, parts: ResolvedParts, family: Family, options: Options | None = None
) -> Arranged:
    """Change `model` in place as an effective recipe says. Raises UserError for levers that this model cannot take."""
    options = options or Options()
    lever = "full-logits" if options.generates else str(recipe.levers.loss)
    adapted_heads = [name for name in parts.lora_modules if family.part_of(name + ".") == "head"]
    if lever not in ("full-logits", "auto") and adapted_heads:
        raise UserError(
            f"levers.loss: {lever} multiplies the head itself, and {adapted_heads[0]} has an adapter",
            "levers.loss: full-logits, or parts.head: frozen",
        )
    loss = put_head_off(model, lever, autocast_dtype(recipe), options.kernel)
    if recipe.levers.parallel == "zero3":
        merge_at_once(model)
    if options.pack is not None:
        options.pack(model)
    if parts.lora_modules:
        # Seeded here: how much chance loading has used up before differs between layouts.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = add_adapters(model, _as_the_engine_has_them(recipe), parts.lora_modules)
    if options.load is not None:
        options.load(model)
    # PEFT's whole copies of `lora.modules_to_save` learn beside the adapters; what they were copied from does not.
    set_learning(model, lambda name: is_adapter(name) or COPY in name or base_name(name) in parts.learning)
    if not options.generates:
        _run_everywhere(model, recipe, family)
    precision = precision_under(str(recipe.levers.precision), str(recipe.levers.parallel))
    idle = {name for name, _ in model.named_parameters() if base_name(name) in parts.idle}
    set_dtypes(model, precision.learning, precision.frozen, keep=is_adapter, idle=idle)
    if options.pack is not None and recipe.lora.kbit_upcast:
        upcast_the_rest(model)
    offload = recipe.levers.activation_offload is True
    checkpointed = set_checkpointing(model, part_finder(family), checkpointing_modes(recipe), offload)
    return Arranged(model, loss, checkpointed)


def _run_everywhere(model: nn.Module, recipe: Recipe, family: Family) -> None:
    """Where the tower or the connector learns, or is gathered as it runs, it runs in every micro-batch."""
    part_of, gathered = part_finder(family), recipe.levers.parallel in GATHERS
    learning = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if gathered or learning & PICTURE_PARTS:
        show_grey_picture(model, family, always=gathered)


def _as_the_engine_has_them(recipe: Recipe) -> Lora:
    """The adapters in the dtype that they have under the recipe's engine.

    Most engines cast them by themselves; ZeRO in fp32 would leave 16-bit ones as they are, beside fp32 master weights.
    """
    strategy, name = STRATEGIES[recipe.levers.parallel], str(recipe.levers.precision)
    if name not in strategy.casts_adapters:
        return recipe.lora
    learning = precision_under(name, strategy.name).learning
    short = next(short for short, full in LORA_DTYPES.items() if full == learning)
    return dataclasses.replace(recipe.lora, dtype=short)  # type: ignore[arg-type]


def part_finder(family: Family) -> Callable[[str], str]:
    """Gives the part of a parameter or module name of a model with or without adapters."""
    return lambda name: family.part_of(base_name(name))


def autocast_dtype(recipe: Recipe) -> torch.dtype | None:
    """The dtype that products run in under autocast; None without autocast."""
    compute = PRECISIONS[str(recipe.levers.precision)].compute
    return DTYPES[compute] if recipe.levers.autocast is True else None
