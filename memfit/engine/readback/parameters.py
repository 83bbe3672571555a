"""Parameters by part: how many learn and how many are frozen, in which dtype, and where they live."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from memfit.build.adapters import is_adapter
from memfit.build.freeze import whole_numel
from memfit.catalog.methods import METHODS, default_mode
from memfit.catalog.precisions import PrecisionRow, precision_under
from memfit.engine.readback.live import Asked, Live
from memfit.engine.readback.reading import Reading, stated
from memfit.planner.counting import LORA_DTYPES
from memfit.planner.parts import ORDER
from memfit.specs.plan import Plan
from memfit.strategies import STRATEGIES


@dataclass
class PartCounts:
    """Elements of one part by fate: dtype -> elements of what learns, of adapters, and of what is frozen."""

    learning: Counter[str] = field(default_factory=Counter)
    adapters: Counter[str] = field(default_factory=Counter)
    frozen: Counter[str] = field(default_factory=Counter)
    devices: Counter[str] = field(default_factory=Counter)

    @property
    def trainable(self) -> int:
        return self.learning.total() + self.adapters.total()


def read(live: Live, asked: Asked) -> Iterator[Reading]:
    """One reading a part for its counts, one for all dtypes of a precision, and one for the devices."""
    counts = count_parts(live)
    for part in sorted(counts, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        yield _counts(part, counts[part], asked)
    yield from _precision(counts, asked)


def count_parts(live: Live) -> dict[str, PartCounts]:
    """Every parameter once, whole, also where an engine keeps only a share of it on this rank."""
    found: dict[str, PartCounts] = {}
    for name, parameter in live.model.named_parameters():
        part = found.setdefault(live.part_of(name), PartCounts())
        kind = part.frozen if not parameter.requires_grad else part.adapters if is_adapter(name) else part.learning
        elements = unpacked_numel(parameter)
        kind[dtype_of(parameter)] += elements
        part.devices[share_of(parameter).device.type] += elements
    return found


def share_of(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter, where it is kept: also beside a tensor that DeepSpeed has emptied."""
    kept = getattr(parameter, "ds_tensor", None)
    if kept is not None:
        return kept
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def dtype_of(parameter: torch.Tensor) -> str:
    """torch's name of the dtype that a parameter is kept in; `nf4`, `fp4` where bitsandbytes packed it."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return str(getattr(state, "quant_type", "4bit"))
    return str(share_of(parameter).dtype).removeprefix("torch.")


def unpacked_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also of one that is split, or packed two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else whole_numel(parameter)


def _counts(part: str, found: PartCounts, asked: Asked) -> Reading:
    text = f"{found.trainable:,} learn, {found.frozen.total():,} frozen"
    evidence = f"requires_grad and elements of the {part} part's parameters"
    if asked.plan is None:
        return stated(f"parts.{part}", text, evidence)
    forecast, mode = asked.plan.forecast, mode_of(asked.plan, part)
    wanted = f"{forecast.trainable.get(part, 0):,} learn, {forecast.frozen.get(part, 0):,} frozen"
    as_said = {"frozen": not found.trainable, "lora": found.adapters.total() > 0, "full": found.learning.total() > 0}
    return Reading(
        f"parts.{part}",
        f"{mode}: {wanted}",
        text,
        wanted == text and as_said.get(mode, found.trainable > 0),
        evidence,
        f"parts.{part} decides what learns: freeze or release the parameters as the plan has them",
    )


def mode_of(plan: Plan, part: str) -> str:
    """How a part is trained by the recipe's words; one that is not named there goes by the method."""
    pinned = {str(name): mode for name, mode in plan.recipe.parts.items()}.get(part)
    return pinned if pinned is not None else default_mode(METHODS[plan.recipe.method], part)


def wanted_dtypes(plan: Plan) -> tuple[PrecisionRow, str]:
    """The dtypes of a plan's precision as its engine has them, and that of adapters."""
    name, parallel = str(plan.recipe.levers.precision), str(plan.recipe.levers.parallel)
    row = precision_under(name, parallel)
    casts = name in STRATEGIES[parallel].casts_adapters
    return row, row.learning if casts else LORA_DTYPES[plan.recipe.lora.dtype]


def _precision(counts: dict[str, PartCounts], asked: Asked) -> Iterator[Reading]:
    learning, frozen, adapters = Counter[str](), Counter[str](), Counter[str]()
    for each in counts.values():
        learning, frozen, adapters = learning + each.learning, frozen + each.frozen, adapters + each.adapters
    if asked.plan is None:
        yield _dtypes("levers.precision", "what learns", learning, None)
        yield _dtypes("levers.precision", "what is frozen", frozen, None)
    else:
        row, adapter = wanted_dtypes(asked.plan)
        # Frozen tensors among those that learn take their dtype (`ResolvedParts.idle`): both are right for them.
        both = frozenset({row.frozen, row.learning}) if learning else frozenset({row.frozen})
        four_bit = frozenset({"nf4", "fp4"}) if asked.plan.recipe.method == "qlora" else frozenset()
        # prepare_model_for_kbit_training's upcast of what is not packed (`lora.kbit_upcast`).
        four_bit |= frozenset({"float32"}) if four_bit and asked.plan.recipe.lora.kbit_upcast else frozenset()
        yield _dtypes("levers.precision", "what learns", learning, frozenset({row.learning}))
        yield _dtypes("levers.precision", "what is frozen", frozen, both | four_bit)
        if adapters or asked.plan.recipe.method != "full":
            yield _dtypes("lora.dtype", "adapters", adapters, frozenset({adapter}))
    if asked.plan is not None:
        yield _homes(counts, asked.plan)


def _dtypes(lever: str, what: str, found: Counter[str], wanted: frozenset[str] | None) -> Reading:
    text = ", ".join(f"{dtype}: {elements:,}" for dtype, elements in sorted(found.items())) or "none"
    kinds = ", ".join(sorted(found)) or "none"
    if wanted is None:
        return Reading(lever, None, f"{what} in {kinds}", None, f"dtypes of parameters: {text}")
    strange = set(found) - wanted
    fix = f"load the model with dtype={sorted(wanted)[0]}: from_pretrained keeps the checkpoint's own dtype otherwise"
    if lever == "lora.dtype":
        fix = "lora.dtype must reach the adapters: PEFT's autocast_adapter_dtype and its engine change it"
    return Reading(
        lever,
        f"{what} in {' or '.join(sorted(wanted))}",
        f"{what} in {kinds}",
        not strange,
        f"dtypes of parameters, elements: {text}",
        fix,
    )


def _homes(counts: dict[str, PartCounts], plan: Plan) -> Reading:
    """Where the parameters are kept between their uses."""
    devices = Counter[str]()
    for each in counts.values():
        devices += each.devices
    gpu, home = plan.forecast.hardware.gpu is not None, plan.layout.home_parameters
    wanted = "cpu" if not gpu or home == "host" else "cuda"
    found = ", ".join(sorted(devices))
    return Reading(
        "hardware",
        f"parameters on {wanted}",
        f"parameters on {found}",
        found == wanted,
        ", ".join(f"{elements:,} elements on {device}" for device, elements in sorted(devices.items())),
        "no device_map, and no .to() of single modules: the engine places every parameter",
    )
