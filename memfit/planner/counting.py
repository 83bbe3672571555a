"""What one rank counts: the rows that an effective recipe picks, and the terms of states that they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from memfit.catalog.methods import METHODS, QuantRow
from memfit.catalog.optimizers import (
    CHANCE_BYTES,
    CHANCE_CHUNK,
    CHANCE_WIDTH,
    OPTIMIZERS,
    OptimizerRow,
    is_paged,
    rounds_by_chance,
    state_bytes,
    state_formula,
)
from memfit.catalog.precisions import PRECISIONS, PrecisionRow, precision_under
from memfit.physics.memory import (
    ALWAYS,
    PartStates,
    Shape,
    Site,
    largest_touched,
    lifetimes,
    local_shapes,
    numel,
    packed_bytes,
    scale_bytes,
    share,
    state_terms,
)
from memfit.planner.defaults import micro_batches
from memfit.planner.parts import PartGroup, shapes
from memfit.specs.hardware import Hardware
from memfit.specs.ledger import Place, Term
from memfit.specs.plan import Layout
from memfit.specs.profile import ParameterRow
from memfit.specs.recipe import Recipe
from memfit.strategies import STRATEGIES
from memfit.strategies.base import Request, Strategy
from memfit.units import DTYPE_BYTES

META_SOURCE = "parameters of transformers' model on the meta device"
LORA_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
NOT_FORECAST = (
    "activations",
    "logits and loss",
    "temporaries of forward and backward",
    "allocator (reserved above allocated)",
    "CUDA context and workspaces",
    "speed",
)
ON_GPU_ONLY = {"allocator (reserved above allocated)", "CUDA context and workspaces"}
Roles = Sequence[tuple[str, Sequence[ParameterRow]]]


def hidden_size(groups: Sequence[PartGroup]) -> int:
    """The language model's hidden size: the width of its embeddings. 0 for a model without any."""
    rows = [row for group in groups for rows in (group.learning, group.frozen, group.quantised) for row in rows]
    found = [row.shape[1] for row in rows if row.kind == "embedding" and row.part == "language" and len(row.shape) == 2]
    return max(found, default=0)


def roles_of(group: PartGroup) -> Roles:
    """What learns in a part, by role."""
    return (("", group.learning), ("adapter", group.adapters), ("saved", group.saved))


class Counting:
    """The rows that one effective recipe picks, and the terms they make."""

    def __init__(self, recipe: Recipe, hardware: Hardware, groups: Sequence[PartGroup]) -> None:
        self.recipe, self.hardware, self.groups = recipe, hardware, groups
        self.strategy: Strategy = STRATEGIES[recipe.levers.parallel]
        self.precision: PrecisionRow = precision_under(str(recipe.levers.precision), recipe.levers.parallel)
        self.layout: Layout = self.strategy.layout(self._request())
        self.optimizer: OptimizerRow = OPTIMIZERS[recipe.levers.optimizer]
        self.quant: QuantRow | None = METHODS[recipe.method].quant
        self.micro_batches = micro_batches(recipe, hardware)
        # Rates by part make a group of parameters for each; engines that flatten keep groups apart.
        self.one_group = not isinstance(recipe.schedule.learning_rate, Mapping)
        slots = [(group.part, role) for group in groups for role, rows in roles_of(group) if rows]
        self._first = slots[0] if slots else ("", "")
        self._flat_groups = self._count_flat_groups(slots)
        self._boundary = self._whole_at_edges()
        self.site = Site("gpu" if hardware.gpu else "host", hardware.gpus_per_node, self._homes())
        self.alive = lifetimes(self.micro_batches, self.layout.resident, self.layout.gradients_end)
        self.sources = {
            "weights": f"{META_SOURCE}; {self.precision.name}: {self.precision.source}",
            "gradients": f"{self.layout.source}; {self.precision.name}",
            "gradient_copies": self.layout.source,
            "master": self.precision.source,
            "optimizer": self.optimizer.source,
            "paged": self.optimizer.source,
        }

    def learning_groups(self) -> list[list[ParameterRow]]:
        """What the optimizer is given: all that learns in one list, or a list for each part with a rate of its own."""
        parts = [[row for _, rows in roles_of(group) for row in rows] for group in self.groups]
        return [[row for rows in parts for row in rows]] if self.one_group else [rows for rows in parts if rows]

    def sub_groups(self, limit: int) -> list[int]:
        """Elements of the own share that are stepped at once: whole tensors until `limit` is reached (0: a group).

        Source: deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups.
        """
        found: list[int] = []
        for rows in self.learning_groups():
            running = 0
            for shape in self.local(shapes(rows), self.layout.split_optimizer):
                running += prod(shape)
                if limit and running >= limit:
                    found, running = [*found, running], 0
            found += [running] if running else []
        return found

    def _count_flat_groups(self, slots: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int]:
        """Flat tensors that the optimizer steps, by the part and role they are counted with; empty: none is flat."""
        unit = self.layout.split_unit
        if unit == "rows" or not self.layout.engine.bucket_width:
            return {}
        if unit == "part" and not self.one_group:
            return dict.fromkeys(slots, 1)
        return {self._first: len(self.sub_groups(self.layout.engine.step_elements if unit == "tensor" else 0))}

    def _whole_at_edges(self) -> int:
        """Elements by which the fullest rank's gradients exceed its share: tensors that it shares stay whole there."""
        if not self.layout.whole_at_edges:
            return 0
        extra, ways = 0, self.hardware.ranks
        for rows in self.learning_groups():
            counts = [row.numel for row in rows]
            own = numel(self.local([(sum(counts),)], ways))
            extra += largest_touched(counts, own, ways) - own
        return max(0, extra)

    def _request(self) -> Request:
        recipe, levers = self.recipe, self.recipe.levers
        return Request(
            ranks=self.hardware.ranks,
            width=int(DTYPE_BYTES[self.precision.learning]),
            compute_width=int(DTYPE_BYTES[self.precision.compute]),
            master_width=int(DTYPE_BYTES[self.precision.master]) if self.precision.master else 0,
            hidden=hidden_size(self.groups),
            values=recipe.engine,
            offload=levers.offload,
            offload_to=levers.offload_to,
            # Without a GPU torch has nothing to pin for.
            pin=levers.pin_memory is True and levers.offload != "none" and self.hardware.gpu is not None,
        )

    def _homes(self) -> dict[str, Place]:
        """Where states live that are not beside the computation. Gradients go where they are stepped."""
        named: dict[str, Place] = {"host": "host", "nvme": "disk"}
        weights, optimizer = self.layout.home_parameters, self.layout.home_optimizer
        homes: dict[str, Place] = {}
        if weights in named:
            homes["weights"] = named[weights]
        if optimizer in named:
            homes |= dict.fromkeys(("master", "optimizer"), named[optimizer])
            homes |= dict.fromkeys(("gradients", "gradient_copies"), "host")
        return homes

    def group_terms(self, group: PartGroup) -> list[Term]:
        """The terms of one part: its own tensors, its adapters, its saved modules and its 4-bit scales."""
        terms = [term for one in self.states(group) for term in state_terms(one, self.alive, self.site, self.sources)]
        return terms + self.quant_terms(group)

    def states(self, group: PartGroup) -> tuple[PartStates, ...]:
        """What one rank holds of a part, by role."""
        return (
            dataclasses.replace(
                self._states(group.part, "", group.learning, group.frozen, group.quantised),
                idle=numel(self.local(shapes(group.idle), self.layout.split_parameters)),
                idle_width=self.idle_width,
            ),
            self._states(group.part, "adapter", group.adapters),
            self._states(group.part, "saved", group.saved),
        )

    def tensor_sizes(self, group: PartGroup, kind: str) -> list[int]:
        """Bytes of each tensor of one part on one device: "weights", "master" or "optimizer" (one tensor a moment).

        What is paged or lives elsewhere is left out.
        """
        layout = self.layout
        if kind in self.site.homes:
            return []
        if kind == "weights":
            frozen = self.frozen_width
            sizes = [
                numel([shape]) * self.width(role)
                for role, rows in roles_of(group)
                for shape in self.local(shapes(rows), layout.split_parameters)
            ]
            for rows, width in ((group.frozen, frozen), (group.idle, self.idle_width)):
                sizes += [numel([shape]) * width for shape in self.local(shapes(rows), layout.split_parameters)]
            return sizes + [
                packed_bytes(numel([shape])) for shape in self.local(shapes(group.quantised), layout.split_parameters)
            ]
        return [size for role, rows in roles_of(group) for size in self._stepped_sizes((group.part, role), rows, kind)]

    def _stepped_sizes(self, slot: tuple[str, str], rows: Sequence[ParameterRow], kind: str) -> list[int]:
        role = slot[1]
        local = self.local(shapes(rows), self.layout.split_optimizer)
        if kind == "master":
            return [numel([shape]) * self.stepped_width(role) for shape in local] if self.has_master else []
        kinds = [row.kind for row in rows] if len(rows) == len(local) else ["flat"] * len(local)
        moments, sizes = max(1, self.optimizer.moments), []
        for shape, name in zip(local, kinds, strict=True):
            if not is_paged(self.optimizer, shape):
                size = state_bytes(self.optimizer, shape, self.stepped_width(role), name)
                sizes += [size // moments] * moments
        return sizes + [4] * self._scalars(slot, len(local))

    def _scalars(self, slot: tuple[str, str], tensors: int) -> int:
        """fp32 scalars of the optimizer on the device, for `tensors` tensors or the flat ones that hold them."""
        row = self.optimizer
        tensors = self._flat_groups.get(slot, 0) if self._flat_groups else tensors
        # DeepSpeedCPUAdam counts steps as Python numbers (deepspeed.ops.adam.cpu_adam).
        elsewhere = bool(self._flat_groups) and self.layout.home_optimizer != "gpu"
        return 0 if elsewhere or (row.scalars_on_host and self.hardware.gpu) else row.scalars * tensors

    def whole_optimizer(self, role: str, rows: Sequence[ParameterRow]) -> list[int]:
        """Bytes of the optimizer's states and master copy of each tensor, unsplit."""
        width, master = self.stepped_width(role), self.stepped_width(role) if self.has_master else 0
        return [state_bytes(self.optimizer, row.shape, width, row.kind) + row.numel * master for row in rows]

    def foreach_elements(self) -> list[tuple[int, int, str]]:
        """(bytes, elements, part) of every group that the optimizer steps at once."""
        sizes = []
        for group in self.groups:
            for role, rows in roles_of(group):
                count = numel(self.local(shapes(rows), self.layout.split_optimizer))
                sizes.append((count * self.stepped_width(role), count, group.part))
        return sizes

    def step_terms(self) -> list[Term]:
        """What lives only during the optimizer's step. Groups of parameters are stepped in turn: the largest counts."""
        if rounds_by_chance(self.optimizer.name, self.precision.name):
            return self._chance_terms()
        # Without a GPU torch takes one tensor at a time (torch.optim.optimizer:_default_to_fused_or_foreach), and what
        # is offloaded is stepped in host memory by an optimizer without temporaries.
        if self.optimizer.step_temporary != "state-copy" or not self.hardware.gpu or self.site.homes:
            return []
        size, count, part = max(self.foreach_elements())
        formula = f"{count:,} second moments of the largest group x {size // max(count, 1)} B"
        term = self.term("step.foreach", "square roots of the second moments", part, size, self.optimizer.source)
        return [dataclasses.replace(term, alive=("step",), formula=formula)] if size else []

    def _chance_terms(self) -> list[Term]:
        """A chunk of bf16 weights in fp32, while it is stepped and rounded by chance."""
        if self.site.homes:
            return []
        sizes = [0]
        for group in self.groups:
            for role, rows in roles_of(group):
                if self.stepped_width(role) == CHANCE_WIDTH:
                    own = [numel([shape]) for shape in self.local(shapes(rows), self.layout.split_optimizer)]
                    # ZeRO makes one tensor of all; others step one at a time.
                    sizes.append(sum(own) if self.layout.engine.step_copy_widths else max(own, default=0))
        most = max(sizes)
        count = min(CHANCE_CHUNK, most)
        source = "memfit.engine.stochastic:StochasticAdamW"
        term = self.term("step.chance", "weights in fp32 to be rounded", "engine", count * CHANCE_BYTES, source)
        term = dataclasses.replace(term, alive=("step",), formula=f"{count:,} elements at once x {CHANCE_BYTES} B")
        return [term] if count else []

    def term(self, name_id: str, name: str, part: str, size: int, source: str) -> Term:
        """A term that lives in every phase."""
        ranks = self.site.ranks(self.site.place)
        formula = f"{size:,} B" + ("" if ranks == 1 else f" x {ranks} ranks of the node")
        return Term(name_id, name, part, self.site.place, ALWAYS, size * ranks, source, formula)

    def at(self, place: Place, name_id: str, name: str, part: str, size: int) -> Term:
        """A term of one place, named after the engine, that lives in every phase."""
        ranks = self.site.ranks(place)
        formula = f"{size:,} B" + ("" if ranks == 1 else f" x {ranks} ranks of the node")
        return Term(name_id, name, part, place, ALWAYS, size * ranks, self.layout.source, formula)

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

    def local(self, all_shapes: Sequence[Shape], ways: int) -> tuple[Shape, ...]:
        return local_shapes(all_shapes, ways, self.layout.split_unit)

    def width(self, role: str) -> int:
        """Bytes of an element that learns. Adapters have their own dtype unless the engine casts them."""
        own = role == "adapter" and self.precision.name not in self.strategy.casts_adapters
        name = LORA_DTYPES[self.recipe.lora.dtype] if own else self.precision.learning
        return int(DTYPE_BYTES[name])

    @property
    def has_master(self) -> bool:
        """Whether the optimizer steps a copy of the weights.

        ZeRO-3 means to save the copy where the weights have its dtype and device already, but compares a torch.device
        with a name, which is never equal (DeepSpeed 0.19.8, stage3:_create_fp32_partitions): there is a copy always.
        """
        return self.precision.master is not None

    def gradient_width(self, role: str) -> int:
        """Bytes of an element of the gradients: offloaded ones are kept as the optimizer steps them."""
        return self.stepped_width(role) if "gradients" in self.site.homes else self.width(role)

    @property
    def idle_width(self) -> int:
        """Bytes of an element that learns nothing among those that do: as built, engines widen what learns only."""
        return int(DTYPE_BYTES[PRECISIONS[self.precision.name].learning])

    @property
    def frozen_width(self) -> int:
        """Bytes of an element that does not learn and is not packed.

        Source: peft.utils.other:prepare_model_for_kbit_training, which `lora.kbit_upcast` stands for.
        """
        widened = self.quant is not None and self.recipe.lora.kbit_upcast
        return 4 if widened else int(DTYPE_BYTES[self.precision.frozen])

    def stepped_width(self, role: str) -> int:
        return int(DTYPE_BYTES[self.precision.master]) if self.precision.master else self.width(role)

    def _states(
        self,
        part: str,
        role: str,
        learning: Sequence[ParameterRow],
        frozen: Sequence[ParameterRow] = (),
        quantised: Sequence[ParameterRow] = (),
    ) -> PartStates:
        layout, learns = self.layout, shapes(learning)
        stepped = self.local(learns, layout.split_optimizer)
        optimizer = self._optimizer_bytes(learning, stepped, (part, role))
        whole = self._boundary if (part, role) == self._first else 0
        return PartStates(
            part=part,
            role=role,
            frozen=numel(self.local(shapes(frozen), layout.split_parameters)),
            frozen_width=self.frozen_width,
            packed=sum(packed_bytes(numel([s])) for s in self.local(shapes(quantised), layout.split_parameters)),
            learning=numel(self.local(learns, layout.split_parameters)),
            width=self.width(role),
            gradients=numel(self.local(learns, layout.split_gradients))
            + (whole if layout.whole_at_edges == "gradients" else 0),
            gradient_width=self.gradient_width(role),
            gradient_copies=layout.gradient_copies * numel(self.local(learns, layout.split_gradient_copies))
            + (whole if layout.whole_at_edges == "gradient_copies" else 0),
            master=numel(stepped) if self.has_master else 0,
            master_width=int(DTYPE_BYTES[self.precision.master]) if self.precision.master else 0,
            **optimizer,
        )

    def _optimizer_bytes(
        self, rows: Sequence[ParameterRow], local: Sequence[Shape], slot: tuple[str, str]
    ) -> dict[str, Any]:
        """Bytes of state, in the optimizer's usual place and paged. Flattened parts are one tensor of no kind."""
        row, width = self.optimizer, self.stepped_width(slot[1])
        kinds = [row.kind for row in rows] if len(rows) == len(local) else ["flat"] * len(local)
        sizes = {"optimizer": 0, "paged": 0}
        for shape, kind in zip(local, kinds, strict=True):
            sizes["paged" if is_paged(row, shape) else "optimizer"] += state_bytes(row, shape, width, kind)
        scalars = self._scalars(slot, len(local))
        sizes["optimizer"] += 4 * scalars
        formula = state_formula(row, local, kinds, width)
        return {**sizes, "optimizer_formula": formula + (f" + {scalars:,} scalars x 4 B" if scalars else "")}

    def quant_terms(self, group: PartGroup) -> list[Term]:
        """Scales and code books are attributes of the tensor, not parameters: whole on every rank."""
        quant, counts = self.quant, [row.numel for row in group.quantised]
        if quant is None or not counts:
            return []
        each = [scale_bytes(n, quant.block, quant.scale_bytes, quant.nested_block, quant.nested_bytes) for n in counts]
        size, names = quant.code_bytes * len(counts), f"of the 4-bit weights, {group.part}"
        blocks = sum(share(count, quant.block) for count in counts)
        nested = sum(each) - blocks * quant.scale_bytes
        formula = f"{blocks:,} blocks of {quant.block} weights x {quant.scale_bytes} B"
        formula += f" + {nested:,} B for the scales' own" if nested else ""
        absmax = self.term("quant.absmax", f"scales {names}", group.part, sum(each), quant.source)
        code = self.term("quant.code", f"code books {names}", group.part, size, quant.source)
        return [
            dataclasses.replace(absmax, formula=absmax.formula.replace(f"{sum(each):,} B", formula)),
            dataclasses.replace(
                code, formula=code.formula.replace(f"{size:,} B", f"{len(counts):,} x {quant.code_bytes} B")
            ),
        ]
