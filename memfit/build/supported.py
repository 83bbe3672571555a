"""Levers that the recipe knows and this version cannot run yet: refused, never silently ignored."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping

from memfit.catalog.methods import METHODS
from memfit.catalog.optimizers import OPTIMIZERS
from memfit.errors import UserError
from memfit.specs.recipe import Recipe


def refuse_what_is_not_built(recipe: Recipe) -> None:
    """Raises UserError that names every pinned value which this version only forecasts."""
    if recipe.levers.linear_attention == "fla" and importlib.util.find_spec("fla") is None:
        raise UserError(
            "levers.linear_attention: fla needs the package flash-linear-attention, which is not installed",
            "pip install flash-linear-attention, or levers.linear_attention: reference",
        )
    if recipe.levers.attention == "flash":
        _refuse_flash(recipe)
    if recipe.levers.loss == "fused" and importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "levers.loss: fused needs the package liger-kernel, which is not installed",
            "pip install liger-kernel, or levers.loss: chunked, which keeps no logits either",
        )
    _refuse_missing_package(recipe)
    found = list(_not_built(recipe))
    if not found:
        return
    lines = found[0] if len(found) == 1 else f"{len(found)} levers:" + "".join(f"\n  {line}" for line in found)
    raise UserError(f"this version of memfit forecasts but does not yet run {lines}", "set these to auto to train now")


def _refuse_missing_package(recipe: Recipe) -> None:
    """UserError where method or optimizer need a package that is not installed."""
    method, optimizer = METHODS[recipe.method], OPTIMIZERS[recipe.levers.optimizer]
    wanted = (
        (f"method: {method.name}", method.package, "method: lora"),
        (f"levers.optimizer: {optimizer.name}", optimizer.package, "levers.optimizer: adamw"),
    )
    for what, package, instead in wanted:
        if package and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{what} needs the package {package}, which is not installed",
                f"pip install 'memfit[qlora]', or {instead}",
            )


def _refuse_flash(recipe: Recipe) -> None:
    """UserError where FlashAttention's package is missing or would meet numbers that its kernels do not take."""
    if importlib.util.find_spec("flash_attn") is None:
        raise UserError(
            "levers.attention: flash needs the package flash-attn, which is not installed",
            "levers.attention: sdpa (torch's own flash kernel where nothing is padded), or pip install flash-attn",
        )
    if recipe.levers.precision == "fp32":
        raise UserError(
            "levers.attention: flash computes in 16 bit only, and levers.precision is fp32",
            "levers.precision: bf16-amp, or levers.attention: sdpa",
        )


def _not_built(recipe: Recipe) -> Iterator[str]:
    levers = recipe.levers
    runs: Mapping[str, tuple[object, ...]] = {
        "method": tuple(name for name, row in METHODS.items() if row.runs_today),
        "levers.loss": ("full-logits", "chunked", "fused"),
        "levers.attention": ("eager", "sdpa", "flash"),
        "levers.linear_attention": ("auto", "reference", "fla"),
        "levers.offload": ("none", "optimizer", "params+optimizer"),
        "levers.offload_to": ("auto", "host"),
        "levers.activation_offload": ("auto", True, False),
        "run.on_oom": ("stop",),
    }
    for key, allowed in runs.items():
        section, _, name = key.rpartition(".")
        value = getattr(getattr(recipe, section) if section else recipe, name)
        if value not in allowed:
            yield f"{key}={value} (runs: {', '.join(str(item) for item in allowed if item != 'auto')})"
    if not OPTIMIZERS[levers.optimizer].runs_today:
        able = ", ".join(name for name, row in OPTIMIZERS.items() if row.runs_today)
        yield f"levers.optimizer={levers.optimizer} (runs: {able})"
    if recipe.lora.modules_to_save:
        yield "lora.modules_to_save (use parts: full copies cost memory that training a part itself does not)"
    method = METHODS[recipe.method]
    if levers.parallel not in method.runs_on:
        able = ", ".join(sorted(method.runs_on))
        yield f"method={recipe.method} with levers.parallel={levers.parallel} (runs: {able})"
    if recipe.engine and levers.parallel == "none":
        yield f"engine.{next(iter(recipe.engine))} (there is no engine configuration under parallel none)"
    if recipe.engine.get("fsdp", {}).get("reshard_root"):
        yield "engine.fsdp.reshard_root (accelerate.utils.fsdp_utils:fsdp2_prepare_model leaves the root gathered)"
