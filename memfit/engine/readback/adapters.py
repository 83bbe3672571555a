"""LoRA adapters and 4-bit modules: where they are, where they should be, and what each one is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from memfit.engine.readback.live import Asked, Live
from memfit.engine.readback.parameters import mode_of, share_of
from memfit.engine.readback.reading import Reading, compared, stated
from memfit.engine.readback.watch import part_or_none
from memfit.families.names import base_name
from memfit.specs.plan import Plan

FOUR_BIT, EIGHT_BIT = "Linear4bit", "Linear8bitLt"
# How adapters begin.
UNIFORM, NORMAL, FROM_WEIGHTS = "A uniform, B zero", "A normal, B zero", "A and B from the weights"
SMALL = "too few numbers of A to tell, B zero"
ENOUGH = 512  # numbers of A: their deviation is known to 5 %


def read(live: Live, asked: Asked) -> Iterator[Reading]:
    """Targets, and the settings of every adapter; whole copies; quantised modules."""
    layers = adapted_layers(live)
    if layers or (asked.plan is not None and wanted_modules(live, asked.plan)):
        yield _targets(live, layers, asked)
    if layers:
        yield from _settings(layers, asked)
        yield _init(live, layers, asked)
        yield _active(layers)
    yield _copies(live, asked)
    yield _quantised(live, asked)


def adapted_layers(live: Live) -> dict[str, LoraLayer]:
    """Base name of the adapted module -> its live adapter layer."""
    return {
        base_name(name + ".").removesuffix("."): module
        for name, module in live.model.named_modules()
        if isinstance(module, LoraLayer)
    }


def wanted_modules(live: Live, plan: Plan) -> set[str]:
    """Base names of the live modules that the recipe's words mean: `lora.targets` inside the parts set to lora."""
    targets, found = plan.recipe.lora.targets, set()
    skipped = unreached(live)
    for name, module in live.model.named_modules():
        base = base_name(name + ".").removesuffix(".")
        part = part_or_none(live.part_of, name)
        if not part or mode_of(plan, part) != "lora" or _is_inside(name) or base.startswith(skipped):
            continue
        inner = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if not isinstance(inner, nn.Linear | Conv1D | nn.Embedding):
            continue
        linear = not isinstance(inner, nn.Embedding)
        if targets == "auto":
            endings = live.family.lora_targets if live.family is not None else ()
            wanted = part == "language" and _ends(base, endings)
        else:
            wanted = (linear and part != "head") if targets == "all-linear" else _ends(base, targets)
        found |= {base} if wanted else set()
    return {name for name in found if not _ends(name, plan.recipe.lora.modules_to_save)}


def unreached(live: Live) -> tuple[str, ...]:
    """Prefixes of modules whose output the loss never sees: they get no adapter."""
    family, encoder = live.family, live.encoder
    if family is None or encoder is None or family.unreached is None:
        return ()
    config = dict(encoder.source.config)
    mode = encoder.processor_settings.get("downsample_mode")
    return tuple(family.unreached(config | ({"downsample_mode": mode} if mode else {})))


def _is_inside(name: str) -> bool:
    """Whether a module is part of an adapter itself."""
    return any(
        mark in f".{name}." for mark in (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_dropout.", ".base_layer.")
    )


def _ends(name: str, endings: Any) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _targets(live: Live, layers: Mapping[str, LoraLayer], asked: Asked) -> Reading:
    by_part: dict[str, int] = {}
    for name in layers:
        part = part_or_none(live.part_of, name) or "no part"
        by_part[part] = by_part.get(part, 0) + 1
    text = ", ".join(f"{count} in {part}" for part, count in sorted(by_part.items())) or "none"
    if asked.plan is None:
        return stated("lora.targets", text, f"adapter layers of PEFT, the first is {next(iter(layers), 'none')}")
    wanted = wanted_modules(live, asked.plan)
    missed, strange = sorted(wanted - set(layers)), sorted(set(layers) - wanted)
    frozen = [n for n in strange if mode_of(asked.plan, part_or_none(live.part_of, n)) == "frozen"]
    told = [f"{len(n)} {what} ({n[0]})" for n, what in ((missed, "without one"), (frozen, "in frozen parts")) if n]
    others = [name for name in strange if name not in frozen]
    told += [f"{len(others)} unasked ({others[0]})"] if others else []
    return Reading(
        "lora.targets",
        f"{len(wanted)} modules",
        f"{len(layers)} modules" + "".join(f"; {each}" for each in told),
        not told,
        f"adapter layers of PEFT in the live model: {text}",
        "lora.targets names endings inside the parts set to lora; a pattern over all parts also meets the vision tower",
    )


def _settings(layers: Mapping[str, LoraLayer], asked: Asked) -> Iterator[Reading]:
    each = list(layers.values())
    lora = asked.plan.recipe.lora if asked.plan is not None else None
    ranks = {int(rank) for layer in each for rank in layer.r.values()}
    shapes = {int(share_rank(layer, name)) for layer in each for name in layer.r}
    alphas = {float(alpha) for layer in each for alpha in layer.lora_alpha.values()}
    scales = {round(float(scale), 9) for layer in each for scale in layer.scaling.values()}
    drops = {_dropout(module) for layer in each for module in layer.lora_dropout.values()}
    variants = {variant_of(layer, name) for layer in each for name in layer.r}
    where = f"{len(each)} adapter layers"
    yield _same(
        "lora.rank", None if lora is None else lora.rank, ranks | (shapes - {0}), f"r of {where}, and rows of A"
    )
    yield _same("lora.alpha", None if lora is None else float(lora.alpha), alphas, f"lora_alpha of {where}")
    wanted = None
    if lora is not None:
        wanted = round(lora.alpha / (math.sqrt(lora.rank) if lora.variant == "rslora" else lora.rank), 9)
    yield _same("lora scale", wanted, scales, f"scaling of {where}: what an adapter's output is multiplied by")
    yield _same("lora.dropout", None if lora is None else float(lora.dropout), drops, f"lora_dropout of {where}")
    yield _same("lora.variant", None if lora is None else lora.variant, variants, f"scaling and magnitudes of {where}")


def share_rank(layer: LoraLayer, name: str) -> int:
    """Rows of A as it is laid out; 0 where an engine keeps only a flat share of it."""
    modules: Mapping[str, Any] = dict(layer.lora_A.items())
    weight = getattr(modules.get(name), "weight", None)
    if weight is None:
        return 0
    shape = getattr(weight, "ds_shape", weight.shape)
    return int(shape[0]) if len(shape) == 2 else 0


def variant_of(layer: LoraLayer, name: str) -> str:
    """lora, rslora or dora, by what the layer has and multiplies with."""
    if name in layer.lora_magnitude_vector:
        return "dora"
    rank, alpha = float(layer.r[name]), float(layer.lora_alpha[name])
    rooted = math.isclose(float(layer.scaling[name]), alpha / math.sqrt(rank))
    return "rslora" if rooted and rank != 1 else "lora"


def _dropout(module: nn.Module) -> float:
    return float(getattr(module, "p", 0.0))


def _same(lever: str, wanted: Any, found: set[Any], evidence: str) -> Reading:
    text = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in sorted(found))
    asked = None if wanted is None else f"{wanted:g}" if isinstance(wanted, float) else str(wanted)
    return compared(lever, asked, text, evidence, f"{lever} of the recipe must reach LoraConfig unchanged")


def _init(live: Live, layers: Mapping[str, LoraLayer], asked: Asked) -> Reading:
    """How the adapters began, by their numbers before the first step."""
    found, evidence = began_as(layers)
    evidence = f"weights of {len(layers)} adapters before the first step: {evidence}"
    init = asked.plan.recipe.lora.init if asked.plan is not None else None
    began = int(live.trainer.state.global_step) == 0  # a run that goes on has adapters that have learned
    if init is None or not began:
        return stated("lora.init", found, evidence, init)
    wanted = {"default": UNIFORM, "gaussian": NORMAL}.get(init, FROM_WEIGHTS)
    right = found == wanted or (found == SMALL and wanted != FROM_WEIGHTS)
    fix = "adapters of an earlier run are in this model, or init_lora_weights was set elsewhere: build it anew"
    return Reading("lora.init", wanted, found, right, evidence, fix, same=False)


def began_as(layers: Mapping[str, LoraLayer]) -> tuple[str, str]:
    """(how A and B were made, the figures that tell), from this rank's share of all adapters.

    Source: peft.tuners.lora.layer:LoraLayer.reset_lora_parameters. B begins at zero; A by default uniform within
    1 / sqrt(inputs), with a deviation of 0.58 of that; `gaussian`: normal, with a deviation of 1 / rank, and beyond
    1.9 deviations now and then, where nothing uniform goes. Other ways make both from the weights.
    """
    downs = [share_of(layer.lora_B[name].weight) for layer in layers.values() for name in layer.lora_B]
    moved = sum(bool((share != 0).any()) for share in downs)
    uniform, normal, still = [], [], 0
    for layer in layers.values():
        for name, module in layer.lora_A.items():
            share = share_of(module.weight).detach().float().flatten()
            still += bool(share.numel()) and not bool((share != 0).any())
            shape = getattr(module.weight, "ds_shape", module.weight.shape)
            if len(shape) == 2:
                uniform.append(share.cpu() * math.sqrt(shape[1]))
                normal.append(share.cpu() * float(layer.r[name]))
    if still or 0 < moved < sum(bool(share.numel()) for share in downs):
        return f"B moved in {moved}, A zero in {still}", f"{len(downs)} adapters"
    if moved:
        return FROM_WEIGHTS, f"B moved in {moved}"
    scaled, by_rank = torch.cat(uniform or [torch.empty(0)]), torch.cat(normal or [torch.empty(0)])
    if scaled.numel() < ENOUGH:
        return SMALL, f"{scaled.numel()} numbers"
    top, deviation = float(scaled.abs().max()), float(scaled.std())
    evidence = f"A reaches {top:.3f} / sqrt(inputs), with a deviation of {float(by_rank.std()):.3f} / rank"
    if top <= 1 + 2**-7 and 0.5 < deviation < 0.65:  # bf16 rounds by 2 ** -8
        return UNIFORM, evidence
    is_normal = 0.7 < float(by_rank.std()) < 1.3 and float((by_rank.abs() / by_rank.std()).max()) > 1.9
    return (NORMAL if is_normal else "A otherwise, B zero"), evidence


def _active(layers: Mapping[str, LoraLayer]) -> Reading:
    """An adapter that is merged or switched off learns nothing."""
    off = [name for name, layer in layers.items() if layer.disable_adapters or layer.merged]
    frozen = [
        name
        for name, layer in layers.items()
        if not all(p.requires_grad for key, p in layer.named_parameters() if "lora_" in key)
    ]
    told = [f"{len(n)} {what} ({n[0]})" for n, what in ((off, "merged or off"), (frozen, "frozen")) if n]
    return Reading(
        "adapters in effect",
        f"{len(layers)}",
        f"{len(layers)}" if not told else "; ".join(told),
        not told,
        "disable_adapters, merged and requires_grad of every adapter layer",
        "enable the adapter and let its weights learn: set_adapter, not merge_adapter",
    )


def _copies(live: Live, asked: Asked) -> Reading:
    """PEFT's whole copies of modules: each holds the module twice."""
    found = {
        base_name(name + ".").removesuffix("."): module
        for name, module in live.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    size = sum(
        int(getattr(p, "ds_numel", p.numel())) * p.element_size()
        for module in found.values()
        for p in module.modules_to_save.parameters()
    )
    text = f"{len(found)} ({', '.join(list(found)[:3])})" if found else "none"
    evidence = f"wrappers of PEFT that train a copy beside the frozen original: {size:,} B of copies"
    if asked.plan is None:
        return stated("lora.modules_to_save", text, evidence)
    endings = asked.plan.recipe.lora.modules_to_save
    unasked = [name for name in found if not _ends(name, endings)]
    missed = [ending for ending in endings if not any(_ends(name, (ending,)) for name in found)]
    return Reading(
        "lora.modules_to_save",
        ", ".join(endings) or "none",
        text,
        not unasked and not missed,
        evidence,
        "parts: {<part>: full} trains a part without a second copy; leave modules_to_save out of LoraConfig",
    )


def _quantised(live: Live, asked: Asked) -> Reading:
    """Modules that hold their weights in 4 or 8 bit, by their own classes."""
    kinds: dict[str, int] = {}
    empty = 0
    for module in live.model.modules():
        name = type(module).__name__ if type(module).__name__ in (FOUR_BIT, EIGHT_BIT) else None
        if name is None or "bitsandbytes" not in type(module).__module__:
            continue
        kinds[name] = kinds.get(name, 0) + 1
        packed = getattr(module.weight, "quant_state", None) is not None or module.weight.dtype == torch.int8
        empty += not packed
    found = ", ".join(f"{count} {name}" for name, count in sorted(kinds.items())) or "none"
    found += f", {empty} of them not packed" if empty else ""
    evidence = "classes of modules, and whether their weights are packed"
    if asked.plan is None:
        return stated("quantised modules", found, evidence)
    wanted = asked.plan.recipe.method == "qlora"
    text = "4 bit in the language part" if wanted else "none"
    right = (set(kinds) == {FOUR_BIT} and not empty) if wanted else not kinds
    return Reading(
        "method (quantised modules)",
        text,
        found,
        right,
        evidence,
        "give from_pretrained a BitsAndBytesConfig(load_in_4bit=True) under qlora, and none otherwise",
    )
