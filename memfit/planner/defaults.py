"""`auto` becomes a value: the documented defaults of `memfit estimate`, and what does not go together is refused.

Facts of compatibility stand on the rows (`runs_on`, `needs_gpu`); they are checked here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

from memfit.catalog.methods import METHODS
from memfit.catalog.optimizers import OPTIMIZERS, find_optimizer
from memfit.catalog.precisions import PRECISIONS, ZERO, find_precision, nearest_precision, supported
from memfit.errors import UserError
from memfit.families.base import Family
from memfit.planner.parts import resolve_with_problems
from memfit.planner.problems import Problem, as_error, listed
from memfit.specs.hardware import Hardware
from memfit.specs.profile import Profile
from memfit.specs.recipe import HardwareKeys, Levers, PartName, Recipe
from memfit.specs.workload import Workload
from memfit.strategies import STRATEGIES

AUTO = "auto"
# `batch: auto` is the multiple of GPUs x micro_batch nearest to this.
USUAL_BATCH = 32
# FlashAttention-2 needs Ampere or newer. Source: its README, "NVIDIA CUDA Support".
FLASH_CAPABILITY = 8.0


def resolve(
    recipe: Recipe, hardware: Hardware, family: Family, profile: Profile, workload: Workload | None = None
) -> tuple[Recipe, tuple[str, ...]]:
    """The effective recipe, and the dotted keys that were `auto` and have a value now.

    `image.*` and `max_length` stay `auto`, which is their value: nothing is lost. Raises UserError with everything that
    does not go together with this model and this hardware.
    """
    defaults: list[str] = []
    problems = list(_unknown_rows(recipe))
    levers = recipe.levers
    if not problems:
        levers = _levers(recipe, hardware, defaults)
        problems += _lever_problems(recipe, levers, hardware)
    batch = _batch(recipe, levers, hardware, defaults, problems)
    resolved, part_problems = resolve_with_problems(recipe, family, profile)
    problems += part_problems
    if problems:
        raise as_error(problems)
    if recipe.hardware == AUTO and hardware.detected:
        defaults.append("hardware")
    if recipe.workload == AUTO and (workload is None or workload.source == "default"):
        defaults.append("workload")
    effective = dataclasses.replace(
        recipe,
        parts={cast(PartName, part): mode for part, mode in resolved.modes.items()},
        levers=levers,
        batch=batch,
        hardware=_hardware_keys(recipe, hardware),
    )
    return effective, tuple(sorted(defaults))


def micro_batches(recipe: Recipe, hardware: Hardware) -> int:
    """Micro-batches that a rank runs before each optimizer step, in an effective recipe."""
    return int(recipe.batch) // (hardware.ranks * int(recipe.levers.micro_batch))


def _hardware_keys(recipe: Recipe, hardware: Hardware) -> Any:
    """The hardware by its name, so that a written recipe means the same elsewhere; a GPU without a row has none."""
    if hardware.gpu and hardware.gpu.verified == "detected":
        return recipe.hardware
    return HardwareKeys(gpus=hardware.text, host_memory=hardware.host_memory_bytes, nvme=hardware.nvme_bytes)


def _unknown_rows(recipe: Recipe) -> Iterator[Problem]:
    for find, name in ((find_precision, recipe.levers.precision), (find_optimizer, recipe.levers.optimizer)):
        if name != AUTO:
            try:
                find(name)
            except UserError as error:
                yield f"levers.{error.problem.removeprefix('unknown ')}", error.hint


def _levers(recipe: Recipe, hardware: Hardware, defaults: list[str]) -> Levers:
    """Every lever with a value. The order matters: precision follows parallel, autocast follows precision."""
    chosen: dict[str, Any] = {field.name: getattr(recipe.levers, field.name) for field in dataclasses.fields(Levers)}

    def default(name: str, value: Any) -> None:
        if chosen[name] == AUTO:
            chosen[name] = value
            defaults.append(f"levers.{name}")

    default("parallel", "none" if hardware.ranks == 1 else "ddp")
    default("precision", _precision(recipe, chosen["parallel"], hardware))
    default("autocast", PRECISIONS[chosen["precision"]].autocast)
    default("optimizer", "adamw")
    default("checkpointing", "full")
    default("loss", "full-logits")
    default("attention", "sdpa")
    default("linear_attention", "reference")
    default("offload", "none")
    default("offload_to", "host")
    # DeepSpeed 0.19 pins offloaded states by default; without offload there is nothing to pin.
    default("pin_memory", chosen["offload"] != "none")
    default("activation_offload", False)
    default("allocator", "default")
    default("micro_batch", 1)
    return Levers(**chosen)


def _precision(recipe: Recipe, parallel: str, hardware: Hardware) -> str:
    name = "bf16-mixed" if parallel in ZERO else METHODS[recipe.method].default_precision
    if supported(PRECISIONS[name], hardware):
        return name
    return "fp16-mixed" if parallel in ZERO else "fp16-amp"


def _batch(recipe: Recipe, levers: Levers, hardware: Hardware, defaults: list[str], problems: list[Problem]) -> int:
    micro = 1 if levers.micro_batch == AUTO else int(levers.micro_batch)
    unit = hardware.ranks * micro
    if recipe.batch == AUTO:
        defaults.append("batch")
        return max(1, int(USUAL_BATCH / unit + 0.5)) * unit
    batch = int(recipe.batch)
    if batch % unit:
        below = batch // unit * unit
        near = [below, below + unit] if below else [unit, 2 * unit]
        what = "GPUs" if hardware.gpu else "CPU ranks"
        problems.append(
            (
                f"batch {batch} is not a multiple of {hardware.ranks} {what} x micro_batch {micro} = {unit}",
                f"batch: {near[0]} or {near[1]}",
            )
        )
    return batch


def _lever_problems(recipe: Recipe, levers: Levers, hardware: Hardware) -> Iterator[Problem]:
    yield from _parallel_problems(levers, hardware)
    yield from _precision_problems(recipe, levers, hardware)
    row = OPTIMIZERS[levers.optimizer]
    if levers.parallel not in row.runs_on:
        names = [other.name for other in OPTIMIZERS.values() if levers.parallel in other.runs_on]
        if names:
            yield f"levers.optimizer: {row.name} does not run with parallel: {levers.parallel}", f"use {listed(names)}"
    gpu_only = [
        (f"levers.optimizer: {row.name}", row.needs_gpu, "levers.optimizer: adamw"),
        (f"method: {recipe.method}", METHODS[recipe.method].needs_gpu, "method: lora"),
        ("levers.attention: flash", levers.attention == "flash", "levers.attention: sdpa"),
        ("levers.linear_attention: fla", levers.linear_attention == "fla", "levers.linear_attention: reference"),
        ("levers.loss: fused", levers.loss == "fused", "levers.loss: chunked"),
    ]
    for what, needs_gpu, hint in gpu_only:
        if needs_gpu and hardware.gpu is None:
            yield f"{what} needs a GPU, and {hardware.text} has none", hint
    if levers.attention == "flash" and hardware.gpu and _capability(hardware) < FLASH_CAPABILITY:
        yield (
            f"levers.attention: flash needs compute capability {FLASH_CAPABILITY:.0f}.0, "
            f"{hardware.gpu.name} has {hardware.gpu.compute_capability}",
            "levers.attention: sdpa",
        )


def _parallel_problems(levers: Levers, hardware: Hardware) -> Iterator[Problem]:
    ranks = hardware.ranks
    if levers.parallel not in STRATEGIES:
        yield (
            f"levers.parallel: {levers.parallel} is not forecast in this version",
            f"use {listed(list(STRATEGIES))}",
        )
    elif levers.parallel == "none" and ranks > 1:
        what = "GPUs" if hardware.gpu else "CPU ranks"
        yield (
            f"levers.parallel: none uses one of the {ranks} {what} of {hardware.text}",
            "levers.parallel: ddp, or hardware with one",
        )
    yield from _offload_problems(levers, hardware)
    chosen = levers.checkpointing
    if levers.activation_offload is True and set(chosen.values() if isinstance(chosen, dict) else [chosen]) == {"none"}:
        yield (
            "levers.activation_offload moves what checkpointed layers keep, and levers.checkpointing is none",
            "levers.checkpointing: full, or levers.activation_offload: false",
        )


def _offload_problems(levers: Levers, hardware: Hardware) -> Iterator[Problem]:
    """Who can put what where stands on the strategies' rows."""
    strategy = STRATEGIES.get(levers.parallel)
    if levers.offload == "none" or strategy is None:
        return
    wanted = (levers.offload, levers.offload_to)
    if wanted not in strategy.offloads:
        names = [row.name for row in STRATEGIES.values() if wanted in row.offloads]
        yield (
            f"levers.offload: {levers.offload} to {levers.offload_to} does not run with parallel: {levers.parallel}",
            f"levers.parallel: {listed(names)}" if names else "levers.offload: none",
        )
    row = OPTIMIZERS[levers.optimizer]
    if row.states != "like-parameter":
        yield (
            f"levers.offload: {levers.offload} steps in host memory, where {row.name} does not run",
            "levers.optimizer: adamw",
        )


def _precision_problems(recipe: Recipe, levers: Levers, hardware: Hardware) -> Iterator[Problem]:
    row = PRECISIONS[str(levers.precision)]
    near = nearest_precision(row, levers.parallel, hardware)
    hint = f"levers.precision: {near}" if near else "levers.parallel: ddp"
    if levers.parallel in STRATEGIES and levers.parallel not in row.runs_on:
        yield f"levers.precision: {row.name} does not run with parallel: {levers.parallel}", hint
    elif not supported(row, hardware) and hardware.gpu:
        yield f"levers.precision: {row.name} needs bf16, which {hardware.gpu.name} does not have", hint
    if row.autocast and levers.autocast is False:
        yield f"levers.autocast: false, but {row.name} computes under autocast", "levers.autocast: auto"
    if levers.autocast is True and row.compute == "float32":
        yield f"levers.autocast: true, but {row.name} computes in fp32", "levers.autocast: auto"
    yield from _adapter_problems(recipe, levers, hardware)


def _adapter_problems(recipe: Recipe, levers: Levers, hardware: Hardware) -> Iterator[Problem]:
    strategy = STRATEGIES.get(levers.parallel)
    has_adapters = bool(METHODS[recipe.method].parts) or "lora" in recipe.parts.values()
    if not has_adapters or strategy is None or levers.precision in strategy.casts_adapters:
        return
    if recipe.lora.dtype == "bf16" and hardware.gpu and not hardware.gpu.has_bf16:
        yield f"lora.dtype: bf16, which {hardware.gpu.name} does not have", "lora.dtype: fp32"
    if recipe.lora.dtype == "fp16" and levers.precision == "fp16-amp":
        # torch.amp.GradScaler.unscale_ raises "Attempting to unscale FP16 gradients."
        yield "lora.dtype: fp16 cannot learn under fp16-amp: its gradient scaler refuses fp16", "lora.dtype: fp32"


def _capability(hardware: Hardware) -> float:
    return float(hardware.gpu.compute_capability or 0) if hardware.gpu else 0.0
