"""Levers that the recipe knows and this version cannot run yet: refused, never silently ignored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memfit.catalog.optimizers import OPTIMIZERS
from memfit.errors import UserError
from memfit.specs.recipe import Recipe

_SEVERAL = "this version of memfit trains on one GPU; parallel {} is forecast only"


def refuse_what_is_not_built(recipe: Recipe) -> None:
    """Raises UserError that names every pinned value which this version only forecasts."""
    found = list(_not_built(recipe))
    if not found:
        return
    if found == [_SEVERAL.format(recipe.levers.parallel)]:
        raise UserError(found[0], "train on one for now: --gpus 1x and the GPU's name, or --gpus 1xcpu")
    lines = found[0] if len(found) == 1 else f"{len(found)} levers:" + "".join(f"\n  {line}" for line in found)
    raise UserError(f"this version of memfit forecasts but does not yet run {lines}", "set these to auto to train now")


def _not_built(recipe: Recipe) -> Iterator[str]:
    levers = recipe.levers
    runs: Mapping[str, tuple[object, ...]] = {
        "method": ("full", "lora"),
        "levers.loss": ("full-logits",),
        "levers.attention": ("eager", "sdpa", "flash"),
        "levers.linear_attention": ("auto", "reference"),
        "levers.offload": ("none",),
        "levers.activation_offload": ("auto", False),
        "levers.allocator": ("auto", "default"),
        "levers.packing": (False,),
        "run.on_oom": ("stop",),
        "goal": ("fast",),
    }
    for key, allowed in runs.items():
        section, _, name = key.rpartition(".")
        value = getattr(getattr(recipe, section) if section else recipe, name)
        if value not in allowed:
            yield f"{key}={value} (runs: {', '.join(str(item) for item in allowed if item != 'auto')})"
    if levers.parallel != "none":
        yield _SEVERAL.format(levers.parallel)
    chosen = levers.checkpointing
    for part, mode in chosen.items() if isinstance(chosen, Mapping) else [("", chosen)]:
        if mode == "selective":
            yield f"levers.checkpointing{'.' if part else ''}{part}=selective (runs: none, full, every-N)"
    if not OPTIMIZERS[levers.optimizer].runs_today:
        able = ", ".join(name for name, row in OPTIMIZERS.items() if row.runs_today)
        yield f"levers.optimizer={levers.optimizer} (runs: {able})"
    if recipe.lora.modules_to_save:
        yield "lora.modules_to_save (use parts: full copies cost memory that training a part itself does not)"
    if recipe.engine:
        yield f"engine.{next(iter(recipe.engine))} (there is no engine configuration under parallel none)"
