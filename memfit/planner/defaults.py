"""`auto` becomes a value: the documented defaults of `memfit estimate`, and what does not go together is refused.

Facts of compatibility stand on the rows (`runs_on`, `needs_gpu`); they are checked here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

from memfit.catalog.methods import METHODS
from memfit.catalog.optimizers import OPTIMIZERS, find_optimizer
from memfit.catalog.precisions import (
    FSDP,
    PRECISIONS,
    ZERO,
    find_precision,
    nearest_precision,
    opens_autocast,
    supported,
)
from memfit.errors import UserError
from memfit.families.base import Family
from memfit.planner.parts import ResolvedParts, parameter_groups, resolve_with_problems
from memfit.planner.problems import Problem, as_error, listed
from memfit.specs.hardware import Hardware
from memfit.specs.profile import Profile
from memfit.specs.recipe import HardwareKeys, Levers, PartName, Recipe, WorkloadKeys
from memfit.specs.workload import Workload
from memfit.strategies import STRATEGIES

AUTO = "auto"
# `batch: auto` is the multiple of GPUs x micro_batch nearest to this.
USUAL_BATCH = 32
# FlashAttention-2 needs Ampere or newer. Source: its README, "NVIDIA CUDA Support".
FLASH_CAPABILITY = 8.0
# Modules of linear attention. Source: transformers.models.qwen3_5.modeling_qwen3_5:Qwen3_5DecoderLayer.linear_attn.
LINEAR_ATTENTION = ".linear_attn."
BIAS_IN_PLACE = "zero3-linear"  # the row of memfit.trace.cuda.ROWS


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
        problems += _bias_problems(levers, profile)
        problems += _model_problems(recipe, levers, family, profile)
    batch = _batch(recipe, levers, hardware, defaults, problems)
    resolved, part_problems = resolve_with_problems(recipe, family, profile)
    problems += part_problems
    if not part_problems:
        problems += _rate_problems(recipe, profile, resolved)
    if problems:
        raise as_error(problems)
    if recipe.hardware == AUTO and hardware.detected:
        defaults.append("hardware")
    stated = recipe.hardware if isinstance(recipe.hardware, HardwareKeys) else None
    if stated and stated.host_memory is None and hardware.host_memory_bytes is not None:
        defaults.append("hardware.host_memory")
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
                yield f"levers.{error.problem.removeprefix('unknown ')} is unknown", error.hint


def _levers(recipe: Recipe, hardware: Hardware, defaults: list[str]) -> Levers:
    """Every lever with a value. The order matters: precision follows parallel, autocast follows precision."""
    chosen: dict[str, Any] = {field.name: getattr(recipe.levers, field.name) for field in dataclasses.fields(Levers)}

    def default(name: str, value: Any) -> None:
        if chosen[name] == AUTO:
            chosen[name] = value
            defaults.append(f"levers.{name}")

    default("parallel", "none" if hardware.ranks == 1 else "ddp")
    default("precision", _precision(recipe, chosen["parallel"], hardware))
    default("autocast", opens_autocast(chosen["precision"], chosen["parallel"]))
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
    if levers.attention == "flash" and PRECISIONS[str(levers.precision)].compute == "float32":
        # flash_attn.flash_attn_interface: its kernels take fp16 and bf16 only.
        yield (
            f"levers.attention: flash computes in 16 bit only, and levers.precision is {levers.precision}",
            "levers.attention: sdpa, or levers.precision: bf16-amp",
        )
    if levers.attention == "flash" and hardware.gpu and _capability(hardware) < FLASH_CAPABILITY:
        yield (
            f"levers.attention: flash needs compute capability {FLASH_CAPABILITY:.0f}.0, "
            f"{hardware.gpu.name} has {hardware.gpu.compute_capability}",
            "levers.attention: sdpa",
        )


def lever_problems(recipe: Recipe, hardware: Hardware) -> list[Problem]:
    """What does not go together in a recipe whose levers have values all, beside `bias_problems`."""
    return list(_lever_problems(recipe, recipe.levers, hardware))


def bias_problems(levers: Levers, profile: Profile) -> list[Problem]:
    """What selective checkpointing would spoil in this model under this layout."""
    return list(_bias_problems(levers, profile))


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
    if levers.offload == "none" and levers.offload_to == "nvme":
        yield (
            "levers.offload_to: nvme, but levers.offload is none, so that nothing goes there",
            "levers.offload: optimizer with levers.parallel: zero3, or levers.offload_to: host",
        )
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


def _model_problems(recipe: Recipe, levers: Levers, family: Family, profile: Profile) -> Iterator[Problem]:
    """What a recipe asks of a model that has no such thing: left alone, it would silently not be in effect."""
    if levers.linear_attention == "fla" and not any(LINEAR_ATTENTION in row.name for row in profile.parameters):
        yield (
            f"levers.linear_attention: fla, but a {profile.model_type} model has no linear-attention layers",
            "levers.linear_attention: reference",
        )
    images = recipe.workload.images if isinstance(recipe.workload, WorkloadKeys) else None
    if images and family.images is None:
        yield (
            f"workload.images: {images}, but a {profile.model_type} model takes no pictures",
            "leave out workload.images",
        )


def _rate_problems(recipe: Recipe, profile: Profile, resolved: ResolvedParts) -> Iterator[Problem]:
    """Rates by part must name every part that learns, and no part that the model has not."""
    rates = recipe.schedule.learning_rate
    if not isinstance(rates, Mapping):
        return
    learning = [group.part for group in parameter_groups(profile, resolved, recipe.lora) if group.trainable_numel]
    named = list(map(str, rates))
    for part in named:
        if part not in resolved.modes:
            parts = listed(list(resolved.modes), "and")
            yield (
                f"schedule.learning_rate.{part}: a {profile.model_type} model has {parts}, no {part} part",
                f"leave out schedule.learning_rate.{part}",
            )
    missing = [part for part in learning if part not in named]
    if missing:
        learns = "which learns" if len(missing) == 1 else "which learn"
        yield (
            f"schedule.learning_rate names no rate for {listed(missing, 'and')}, {learns}",
            f"add schedule.learning_rate.{missing[0]}, or set parts.{missing[0]}: frozen",
        )


def _bias_problems(levers: Levers, profile: Profile) -> Iterator[Problem]:
    """ZeRO-3's Linear adds its bias to the product in place. Selective checkpointing keeps that product, and the second
    forward adds the bias once more: gradients come out wrong without a word (a test compares them)."""
    chosen, strategy = levers.checkpointing, STRATEGIES.get(levers.parallel)
    if strategy is None or BIAS_IN_PLACE not in strategy.replaces:
        return
    found = [
        row.name
        for row in profile.parameters
        if (chosen.get(cast(PartName, row.part)) if isinstance(chosen, Mapping) else chosen) == "selective"
        and row.kind == "linear"
        and row.block is not None
        and row.name == f"{row.module}.bias"
    ]
    if found:
        yield (
            f"levers.checkpointing: selective under {levers.parallel} adds the bias of {len(found)} layers twice "
            f"({found[0]} ...), and their gradients are wrong",
            "levers.checkpointing: full",
        )


def _precision_problems(recipe: Recipe, levers: Levers, hardware: Hardware) -> Iterator[Problem]:
    row = PRECISIONS[str(levers.precision)]
    near = nearest_precision(row, levers.parallel, hardware)
    hint = f"levers.precision: {near}" if near else "levers.parallel: ddp"
    if levers.parallel in STRATEGIES and levers.parallel not in row.runs_on:
        yield f"levers.precision: {row.name} does not run with parallel: {levers.parallel}", hint
    elif not supported(row, hardware) and hardware.gpu:
        yield f"levers.precision: {row.name} needs bf16, which {hardware.gpu.name} does not have", hint
    if levers.autocast is True and levers.parallel in FSDP:
        yield (
            "levers.autocast: true, but under fsdp modules compute in 16 bit without autocast",
            "levers.autocast: auto",
        )
    if row.autocast and levers.autocast is False and levers.parallel not in FSDP:
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
