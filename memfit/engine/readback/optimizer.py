"""The optimizer that really steps: its class, its groups, and after a step its states."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from memfit.catalog.optimizers import OPTIMIZERS, OptimizerRow, rounds_by_chance
from memfit.engine.readback.handles import zero_of
from memfit.engine.readback.live import Asked, Live
from memfit.engine.readback.parameters import wanted_dtypes
from memfit.engine.readback.reading import Reading, compared, stated
from memfit.specs.plan import Plan
from memfit.strategies.deepspeed_config import CPU_ADAM, offloads

EPS = 1e-8  # transformers.TrainingArguments.adam_epsilon, which memfit leaves as it is
# Class names that stand for a row: torch's own, memfit's, DeepSpeed's on the host, bitsandbytes'.
CLASSES: Mapping[str, str] = {
    "adamw": "AdamW, fused",
    "adamw-foreach": "AdamW",
    "adamw-8bit": "AdamW",
    "paged-adamw-8bit": "AdamW, paged",
    "adafactor": "Adafactor",
    "lion": "Lion",
    "sgd": "SGD",
}
CHANCE, HOST = "StochasticAdamW", "DeepSpeedCPUAdam"


@dataclass(frozen=True)
class Group:
    """One group of parameters as the optimizer has it, with the names of the parameters that it steps."""

    values: Mapping[str, Any]
    names: tuple[str, ...]


def read(live: Live, asked: Asked) -> Iterator[Reading]:
    """The class and the values of every group."""
    inner, groups = innermost(live.trainer.optimizer), groups_of(live)
    yield _class(inner, asked)
    yield _complete(live, groups)
    yield _rates(live, groups, asked)
    yield _betas(groups, asked)
    yield _decay(live, groups, asked)


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that steps, inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is no torch optimizer")
    return optimizer


def groups_of(live: Live) -> list[Group]:
    """The groups with their parameters' names, also where DeepSpeed has put flat copies in the parameters' place."""
    inner, zero = innermost(live.trainer.optimizer), zero_of(live)
    names = {id(parameter): name for name, parameter in live.model.named_parameters()}
    members: dict[int, list[Any]] = defaultdict(list)
    if zero is None:
        for place, group in enumerate(inner.param_groups):
            members[place] += group["params"]
    elif hasattr(zero, "sub_group_to_group_id"):  # ZeRO-3: parameters in sub-groups of a group
        for place, parameters in enumerate(zero.fp16_groups):
            members[zero.sub_group_to_group_id[place]] += parameters
    else:
        for place, parameters in enumerate(zero.bit16_groups):
            members[place] += parameters
    return [
        Group(group, tuple(names.get(id(p), "?") for p in members[place]))
        for place, group in enumerate(inner.param_groups)
    ]


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """The class, and what of its variants makes another row of it."""
    marks, first = [type(optimizer).__name__], optimizer.param_groups[0]
    # Groups made for torch's fused AdamW keep its word when another class takes them over.
    marks += ["fused"] if first.get("fused") and isinstance(optimizer, torch.optim.AdamW) else []
    marks += ["paged"] if getattr(optimizer, "is_paged", False) else []
    return ", ".join(marks)


def wanted_class(plan: Plan, notes: tuple[str, ...]) -> str:
    """The class that a plan's optimizer is. `notes`: what the engine had to choose otherwise, said beforehand."""
    name = plan.recipe.levers.optimizer
    zero = plan.layout.name.startswith("zero")
    if zero and offloads(plan) and name in CPU_ADAM and not any("CPU Adam cannot be built" in note for note in notes):
        return HOST
    return CHANCE if rounds_by_chance(name, str(plan.recipe.levers.precision)) else CLASSES[name]


def _class(inner: torch.optim.Optimizer, asked: Asked) -> Reading:
    wanted = None if asked.plan is None else wanted_class(asked.plan, asked.facts.notes)
    held = [p for group in inner.param_groups for p in group["params"]]  # none between two steps of ZeRO-3
    if wanted == CHANCE and held and not any(map(_is_bf16, held)):
        wanted = CLASSES["adamw"]  # nothing to round: all that learns has fp32 weights (adapters)
    return compared(
        "levers.optimizer",
        wanted,
        name_of(inner),
        f"{type(inner).__module__}.{type(inner).__qualname__} inside trainer.optimizer",
        "an optimizer block in the engine's configuration, or optimizers= given to the Trainer, replaces the recipe's: "
        "remove it",
    )


def _is_bf16(parameter: torch.Tensor) -> bool:
    return parameter.dtype == torch.bfloat16


def _complete(live: Live, groups: list[Group]) -> Reading:
    """Every parameter that learns is stepped once, and no other."""
    wanted = {name for name, parameter in live.model.named_parameters() if parameter.requires_grad}
    stepped = Counter(name for group in groups for name in group.names)
    missed, strange = sorted(wanted - set(stepped)), sorted(set(stepped) - wanted)
    twice = sorted(name for name, times in stepped.items() if times > 1)
    wrong = [
        f"{len(names)} {what} ({names[0]})"
        for names, what in (
            (missed, "learn and are not stepped"),
            (strange, "are stepped and frozen"),
            (twice, "stepped twice"),
        )
        if names
    ]
    return Reading(
        "stepped parameters",
        f"{len(wanted)} tensors",
        f"{len(stepped)} tensors" + "".join(f"; {text}" for text in wrong),
        not wrong,
        f"{len(groups)} groups of the optimizer against requires_grad",
        "make the optimizer after freezing and adapters, from the model that trains",
    )


def base_rate(group: Mapping[str, Any]) -> float:
    """The rate that a schedule multiplies: `initial_lr` once a scheduler exists."""
    return float(group.get("initial_lr", group["lr"]))


def rates_by_part(live: Live, groups: list[Group]) -> dict[str, set[float]]:
    """Base rates of the parameters of each part."""
    found: dict[str, set[float]] = defaultdict(set)
    for group in groups:
        for name in group.names:
            if name != "?":
                found[live.part_of(name)].add(base_rate(group.values))
    return dict(found)


def _rates(live: Live, groups: list[Group], asked: Asked) -> Reading:
    found = rates_by_part(live, groups)
    text = _rates_text(found)
    wanted = asked.key("schedule.learning_rate")
    if wanted is None:
        return stated("schedule.learning_rate", text, "no rate was asked")
    rates = {part: {float(wanted[part] if isinstance(wanted, Mapping) else wanted)} for part in found}
    return compared(
        "schedule.learning_rate",
        _rates_text(rates),
        text,
        "initial_lr of the optimizer's groups, by the parts of the parameters in each",
        "schedule.learning_rate is the only place that sets a rate: remove lr from the engine's optimizer block",
    )


def _rates_text(rates: Mapping[str, set[float]]) -> str:
    return ", ".join(f"{part} {'/'.join(f'{r:g}' for r in sorted(rates[part]))}" for part in sorted(rates)) or "none"


def _betas(groups: list[Group], asked: Asked) -> Reading:
    inner = {(group.values.get("betas"), group.values.get("eps")) for group in groups}
    text = ", ".join(sorted(_betas_text(betas, eps) for betas, eps in inner))
    betas = asked.key("schedule.betas")
    adam = asked.plan is None or OPTIMIZERS[asked.plan.recipe.levers.optimizer].name.find("adamw") >= 0
    if betas is None or not adam:
        return stated("schedule.betas", text, "the optimizer takes none" if not adam else "none were asked")
    return compared(
        "schedule.betas",
        _betas_text(betas, EPS),
        text,
        "betas and eps of the optimizer's groups",
        "set schedule.betas; remove betas and eps from the engine's optimizer block",
    )


def _betas_text(betas: Any, eps: Any) -> str:
    pair = "none" if betas is None else "/".join(f"{float(beta):g}" for beta in betas)
    return f"{pair}, eps {float(eps):g}" if isinstance(eps, float | int) else pair


def _decay(live: Live, groups: list[Group], asked: Asked) -> Reading:
    wanted = asked.key("schedule.weight_decay")
    decaying = set(live.trainer.get_decay_parameter_names(live.model))
    found = {name: float(group.values.get("weight_decay", 0.0)) for group in groups for name in group.names}
    inside = sorted({value for name, value in found.items() if name in decaying})
    outside = sorted({value for name, value in found.items() if name not in decaying})
    text = _decay_text(inside, outside)
    if wanted is None:
        return stated("schedule.weight_decay", text, "none was asked")
    return compared(
        "schedule.weight_decay",
        _decay_text([float(wanted)] if inside else [], [0.0] if outside else []),
        text,
        "weight_decay of the optimizer's groups; biases and norms decay never (Trainer.get_decay_parameter_names)",
        "set schedule.weight_decay; remove weight_decay from the engine's optimizer block",
    )


def _decay_text(inside: list[float], outside: list[float]) -> str:
    return f"weights {_values(inside)}, biases and norms {_values(outside)}"


def _values(values: list[float]) -> str:
    return "/".join(f"{value:g}" for value in values) or "none"


# ---- after a step -------------------------------------------------------------------------------------------------


def read_states(live: Live, asked: Asked, seen: Any) -> Iterator[Reading]:
    """The states that exist once the optimizer has stepped."""
    inner = innermost(live.trainer.optimizer)
    moments, scalars = states_of(inner)
    kinds = Counter[tuple[str, str, str]]()
    for name, tensor in moments:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        kinds[name, str(local.dtype).removeprefix("torch."), local.device.type] += local.numel() * local.element_size()
    total = sum(kinds.values())
    evidence = (
        ", ".join(f"{name} {dtype} on {device}: {size:,} B" for (name, dtype, device), size in sorted(kinds.items()))
        or "no tensor in optimizer.state"
    ) + f"; {len(scalars)} scalars"
    dtypes = sorted({dtype for _, dtype, _ in kinds})
    names = sorted({name for name, _, _ in kinds})
    found = f"{len(names)} in {', '.join(dtypes)}" if kinds else "none"
    if asked.plan is None:
        yield stated("optimizer states", f"{found}, {total:,} B on this rank", evidence)
        return
    row = OPTIMIZERS[asked.plan.recipe.levers.optimizer]
    yield _states(row, asked.plan, (names, dtypes, found), evidence)
    yield _state_homes(asked.plan, {device for _, _, device in kinds}, evidence)


def states_of(optimizer: torch.optim.Optimizer) -> tuple[list[tuple[str, torch.Tensor]], list[torch.Tensor]]:
    """(name, tensor) of every state as large as a tensor of weights may be, and the scalars."""
    moments, scalars = [], []
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                if value.dim() or value.numel() > 1:
                    moments.append((name, value))
                else:
                    scalars.append(value)
    return moments, scalars


def _states(row: OptimizerRow, plan: Plan, live: tuple[list[str], list[str], str], evidence: str) -> Reading:
    names, dtypes, found = live
    precision, adapter = wanted_dtypes(plan)
    zero = plan.layout.name.startswith("zero")
    wanted = {precision.stepped}
    if not zero and plan.recipe.method != "full":
        wanted |= {adapter}
        if not any(mode == "full" or mode.startswith("last-") for mode in map(str, plan.recipe.parts.values())):
            wanted = {adapter}
    if row.states in ("fp32", "factored"):
        wanted = {"float32"}
    if row.states == "blockwise-8bit":
        wanted = {"uint8", "float32"}
    count = {"factored": (2, 3)}.get(row.states, (row.moments,))
    right = (len(names) in count or row.states == "blockwise-8bit") and set(dtypes) <= wanted
    asked = f"{' or '.join(map(str, count))} in {' or '.join(sorted(wanted))}" if row.moments else "none"
    return Reading(
        "optimizer states",
        asked,
        found,
        right if row.moments else not names,
        evidence,
        "levers.precision decides the states' dtype: load the weights in the precision's dtype before the optimizer",
    )


def _state_homes(plan: Plan, devices: set[str], evidence: str) -> Reading:
    gpu = plan.forecast.hardware.gpu is not None
    wanted = "cpu" if not gpu or plan.layout.home_optimizer == "host" else "cuda"
    found = ", ".join(sorted(devices)) or "none"
    if not devices or OPTIMIZERS[plan.recipe.levers.optimizer].paged:  # managed memory is on neither side
        return stated("levers.offload (states)", found, evidence)
    return compared(
        "levers.offload (states)",
        wanted,
        found,
        evidence,
        "levers.offload: optimizer moves the states to host memory; none keeps them on the GPU",
    )
