"""The estimate: the ledger of one pinned run.

In this version its states are exact; what is not forecast yet is listed in `Ledger.missing`, never counted as zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from memfit.catalog.methods import METHODS, QuantRow
from memfit.catalog.optimizers import OPTIMIZERS, OptimizerRow, is_paged, state_bytes, state_rule_text
from memfit.catalog.precisions import PrecisionRow, precision_under
from memfit.families.base import Family
from memfit.physics.memory import (
    ALWAYS,
    PartStates,
    Shape,
    Site,
    lifetimes,
    local_shapes,
    numel,
    packed_bytes,
    scale_bytes,
    state_terms,
)
from memfit.planner.defaults import micro_batches, resolve
from memfit.planner.parts import PartGroup, parameter_groups, resolve_parts, shapes
from memfit.specs.hardware import Hardware
from memfit.specs.ledger import Ledger, Term
from memfit.specs.plan import Forecast, Layout
from memfit.specs.profile import ParameterRow, Profile
from memfit.specs.recipe import Recipe
from memfit.specs.workload import Workload
from memfit.strategies import STRATEGIES
from memfit.strategies.base import Strategy
from memfit.units import DTYPE_BYTES

META_SOURCE = "parameters of transformers' model on the meta device"
LORA_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
NOT_FORECAST = (
    "activations",
    "logits and loss",
    "temporaries of forward and backward",
    "allocator (reserved above allocated)",
    "CUDA context and workspaces",
    "host memory beyond states",
    "disk",
    "speed",
)
ON_GPU_ONLY = {"allocator (reserved above allocated)", "CUDA context and workspaces"}


def estimate_states(
    recipe: Recipe, profile: Profile, family: Family, hardware: Hardware, workload: Workload | None = None
) -> Forecast:
    """The forecast of a recipe's states on the worst rank; `auto` takes the documented defaults.

    Raises UserError with everything that does not go together.
    """
    effective, defaults = resolve(recipe, hardware, family, profile, workload)
    groups = parameter_groups(profile, resolve_parts(effective, family, profile), effective.lora)
    counting = _Counting(effective, hardware)
    terms = [term for group in groups for term in counting.group_terms(group)]
    terms += counting.step_terms(groups)
    if profile.buffers_bytes:
        terms.append(counting.term("buffers", "buffers, no parameters", "model", profile.buffers_bytes, META_SOURCE))
    ledger = Ledger(tuple(terms), counting.missing())
    too_large = _exceeds(ledger, hardware)
    return Forecast(
        verdict="does-not-fit" if too_large else "unknown",
        fits=False if too_large else None,
        ledger=ledger,
        recipe=effective,
        defaults=defaults,
        hardware=hardware,
        workload=workload,
        trainable={group.part: group.trainable_numel for group in groups},
        frozen={group.part: group.frozen_numel for group in groups},
    )


def state_tensors(forecast: Forecast, groups: Sequence[PartGroup], kind: Literal["weights", "optimizer"]) -> list[int]:
    """Bytes of every single tensor of weights or of optimizer states on an unsplit layout, as torch allocates them."""
    counting = _Counting(forecast.recipe, forecast.hardware)
    sizes = [size for group in groups for size in counting.tensor_sizes(group, kind)]
    return [size for size in sizes if size]


def capacity_bytes(hardware: Hardware) -> int | None:
    """The memory in which the states must fit: of one GPU, or of the node for CPU ranks."""
    return hardware.gpu.capacity_bytes if hardware.gpu else hardware.host_memory_bytes


def states_place(hardware: Hardware) -> str:
    """Where the states are: on the GPU, or in host memory on CPU ranks."""
    return "gpu" if hardware.gpu else "host"


def _exceeds(ledger: Ledger, hardware: Hardware) -> bool:
    capacity = capacity_bytes(hardware)
    return capacity is not None and max(ledger.phase_bytes(states_place(hardware)).values()) > capacity


class _Counting:
    """The rows that one effective recipe picks, and the terms they make."""

    def __init__(self, recipe: Recipe, hardware: Hardware) -> None:
        self.recipe, self.hardware = recipe, hardware
        self.strategy: Strategy = STRATEGIES[recipe.levers.parallel]
        self.layout: Layout = self.strategy.layout(hardware.ranks)
        self.precision: PrecisionRow = precision_under(str(recipe.levers.precision), recipe.levers.parallel)
        self.optimizer: OptimizerRow = OPTIMIZERS[recipe.levers.optimizer]
        self.quant: QuantRow | None = METHODS[recipe.method].quant
        self.site = Site("gpu" if hardware.gpu else "host", hardware.gpus_per_node)
        self.alive = lifetimes(micro_batches(recipe, hardware), self.layout.resident)
        self.sources = {
            "weights": f"{META_SOURCE}; {self.precision.name}: {self.precision.source}",
            "gradients": f"{self.layout.source}; {self.precision.name}",
            "gradient_copies": self.layout.source,
            "master": self.precision.source,
            "optimizer": self.optimizer.source,
            "paged": self.optimizer.source,
        }

    def group_terms(self, group: PartGroup) -> list[Term]:
        """The terms of one part: its own tensors, its adapters, its saved modules and its 4-bit scales."""
        states = [
            self._states(group.part, "", group.learning, group.frozen, group.quantised),
            self._states(group.part, "adapter", group.adapters),
            self._states(group.part, "saved", group.saved),
        ]
        terms = [term for one in states for term in state_terms(one, self.alive, self.site, self.sources)]
        return terms + self._quant_terms(group)

    def tensor_sizes(self, group: PartGroup, kind: str) -> list[int]:
        """Bytes of each tensor of one part. Optimizer states: one tensor a moment, paged ones left out."""
        learning = [("", row) for row in group.learning]
        learning += [("adapter", row) for row in group.adapters] + [("saved", row) for row in group.saved]
        if kind == "weights":
            frozen = int(DTYPE_BYTES[self.precision.frozen])
            sizes = [row.numel * self._width(role) for role, row in learning]
            sizes += [row.numel * frozen for row in group.frozen]
            return sizes + [packed_bytes(row.numel) for row in group.quantised]
        moments, sizes = max(1, self.optimizer.moments), []
        for role, row in learning:
            if not is_paged(self.optimizer, row.shape):
                size = state_bytes(self.optimizer, row.shape, self._stepped_width(role), row.kind)
                sizes += [size // moments] * moments
            if not (self.optimizer.scalars_on_host and self.hardware.gpu):
                sizes += [4] * self.optimizer.scalars
        return sizes

    def step_terms(self, groups: Sequence[PartGroup]) -> list[Term]:
        """What lives only during the optimizer's step. Groups of parameters are stepped in turn: the largest counts."""
        # Without a GPU torch takes one tensor at a time (torch.optim.optimizer:_default_to_fused_or_foreach).
        if self.optimizer.step_temporary != "state-copy" or not self.hardware.gpu:
            return []
        sizes = []
        for group in groups:
            for role, rows in (("", group.learning), ("adapter", group.adapters), ("saved", group.saved)):
                count = numel(self._local(shapes(rows), self.layout.split_optimizer))
                sizes.append((count * self._stepped_width(role), group.part, count))
        size, part, count = max(sizes)
        formula = f"{count:,} second moments of the largest group x {size // max(count, 1)} B"
        term = self.term("step.foreach", "square roots of the second moments", part, size, self.optimizer.source)
        return [dataclasses.replace(term, alive=("step",), formula=formula)] if size else []

    def term(self, name_id: str, name: str, part: str, size: int, source: str) -> Term:
        """A term that lives in every phase."""
        ranks = self.site.ranks(self.site.place)
        formula = f"{size:,} B" + ("" if ranks == 1 else f" x {ranks} ranks of the node")
        return Term(name_id, name, part, self.site.place, ALWAYS, size * ranks, source, formula)

    def missing(self) -> tuple[str, ...]:
        """What this version cannot forecast for this run, in plain words."""
        extra = list(self.strategy.not_forecast)
        foreach_on_cpu = self.optimizer.step_temporary == "state-copy" and not self.hardware.gpu
        if self.optimizer.step_temporary == "unknown" or foreach_on_cpu:
            extra.append(f"step temporaries of {self.optimizer.name}")
        if self.quant:
            extra.append("4-bit weights unpacked for a moment")
        if not self.hardware.gpu:
            extra = [words for words in extra if words != "NCCL buffers"]
        common = [words for words in NOT_FORECAST if self.hardware.gpu or words not in ON_GPU_ONLY]
        return (*common[:3], *extra, *common[3:])

    def _local(self, all_shapes: Sequence[Shape], ways: int) -> tuple[Shape, ...]:
        return local_shapes(all_shapes, ways, self.layout.split_unit)

    def _width(self, role: str) -> int:
        """Bytes of an element that learns. Adapters have their own dtype unless the engine casts them."""
        own = role == "adapter" and self.precision.name not in self.strategy.casts_adapters
        name = LORA_DTYPES[self.recipe.lora.dtype] if own else self.precision.learning
        return int(DTYPE_BYTES[name])

    def _stepped_width(self, role: str) -> int:
        return int(DTYPE_BYTES[self.precision.master]) if self.precision.master else self._width(role)

    def _states(
        self,
        part: str,
        role: str,
        learning: Sequence[ParameterRow],
        frozen: Sequence[ParameterRow] = (),
        quantised: Sequence[ParameterRow] = (),
    ) -> PartStates:
        layout, learns = self.layout, shapes(learning)
        stepped = self._local(learns, layout.split_optimizer)
        optimizer = self._optimizer_bytes(learning, stepped, self._stepped_width(role))
        return PartStates(
            part=part,
            role=role,
            frozen=numel(self._local(shapes(frozen), layout.split_parameters)),
            frozen_width=int(DTYPE_BYTES[self.precision.frozen]),
            packed=sum(packed_bytes(numel([s])) for s in self._local(shapes(quantised), layout.split_parameters)),
            learning=numel(self._local(learns, layout.split_parameters)),
            width=self._width(role),
            gradients=numel(self._local(learns, layout.split_gradients)),
            gradient_copies=layout.gradient_copies * numel(self._local(learns, layout.split_gradient_copies)),
            master=numel(stepped) if self.precision.master else 0,
            master_width=int(DTYPE_BYTES[self.precision.master]) if self.precision.master else 0,
            **optimizer,
        )

    def _optimizer_bytes(self, rows: Sequence[ParameterRow], local: Sequence[Shape], width: int) -> dict[str, Any]:
        """Bytes of state, in the optimizer's usual place and paged. Flattened parts are one tensor of no kind."""
        row = self.optimizer
        kinds = [row.kind for row in rows] if len(rows) == len(local) else ["flat"] * len(local)
        sizes = {"optimizer": 0, "paged": 0}
        for shape, kind in zip(local, kinds, strict=True):
            sizes["paged" if is_paged(row, shape) else "optimizer"] += state_bytes(row, shape, width, kind)
        scalars = 0 if row.scalars_on_host and self.hardware.gpu else row.scalars * len(local)
        sizes["optimizer"] += 4 * scalars
        formula = f"{row.moments} states of {numel(local):,} parameters, {state_rule_text(row, width)}"
        return {**sizes, "optimizer_formula": formula + (f" + {scalars:,} scalars x 4 B" if scalars else "")}

    def _quant_terms(self, group: PartGroup) -> list[Term]:
        """Scales and code books are attributes of the tensor, not parameters: whole on every rank."""
        quant, counts = self.quant, [row.numel for row in group.quantised]
        if quant is None or not counts:
            return []
        each = [scale_bytes(n, quant.block, quant.scale_bytes, quant.nested_block, quant.nested_bytes) for n in counts]
        return [
            self.term(
                "quant.absmax", f"scales of the 4-bit weights, {group.part}", group.part, sum(each), quant.source
            ),
            self.term(
                "quant.code",
                f"code books of the 4-bit weights, {group.part}",
                group.part,
                quant.code_bytes * len(counts),
                quant.source,
            ),
        ]
