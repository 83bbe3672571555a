"""A traced step as an engine runs it: which parameters are gathered when, and what becomes of each gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from memfit.physics.engine import Arrival, Stage, walk
from memfit.physics.gather import ROOT, BlockVisit, by_block, by_module
from memfit.physics.memory import local_shapes, numel
from memfit.planner.counting import Counting, roles_of
from memfit.planner.engine_terms import gathered_width, whole_rows
from memfit.specs.engine_numbers import EngineNumbers
from memfit.specs.stretch import Stretch

# DoRA's module reads the weight of the layer beside it, and the engine gathers that for it from then on.
# Source: peft.tuners.lora.dora:DoraLinearLayer.forward; deepspeed.runtime.zero.parameter_offload:ZeROOrderedDict, which
# registers what a module reads and does not own.
READS_WEIGHT = ".lora_magnitude_vector"
_ADAPTER_ENDINGS = (".default.weight", ".default", ".weight")


@dataclass(frozen=True)
class _Parameter:
    """One parameter: its number, elements, bytes while whole, module, block and what of its gradient stays."""

    number: int
    elements: int
    whole: int
    module: str
    unit: int
    learns: bool
    offset: int
    kept: int


class Stages:
    """The stretches of a trace beside what an engine does in each.

    `blocks`: part -> prefix of its numbered blocks. `tied`: modules that use the parameter of another, and its name.
    """

    def __init__(
        self,
        counting: Counting,
        stretches: Sequence[Stretch],
        blocks: Mapping[str, str],
        tied: Mapping[str, str] | None = None,
    ) -> None:
        self.counting, self.stretches, self.blocks, self.tied = counting, stretches, blocks, tied or {}
        self.engine = _beside_computation(counting)

    @cached_property
    def pieces(self) -> dict[str, list[int]]:
        """Bytes of every piece at every stretch."""
        return walk(self._stages(), self.engine, self._learning, self._partition(), self._accumulated())

    @cached_property
    def parameters(self) -> dict[str, _Parameter]:
        """All parameters by name, in the order of the parts. The original of a module that is saved in full runs no
        more: it stands under a name of its own, without a module."""
        found: dict[str, _Parameter] = {}
        kept = self._kept()
        offset = 0
        for number, (row, width, learns) in enumerate(whole_rows(self.counting)):
            whole = (row.numel + 1) // 2 if width == 0 else row.numel * width
            name, module = (row.name, row.module) if row.name not in found else (f"{row.name} (original)", "")
            found[name] = _Parameter(
                number, row.numel, whole, module, self._unit(row.name), learns, offset, kept.get(name, 0)
            )
            offset += row.numel if learns else 0
        return found

    @property
    def _learning(self) -> int:
        return sum(one.elements for one in self.parameters.values() if one.learns)

    def _partition(self) -> int:
        """Bytes of the own share of the gradients, as the states count it."""
        if not self.engine.partition_ways:
            return 0
        kind = self.counting.layout.whole_at_edges
        return sum(one.bytes()[kind] for group in self.counting.groups for one in self.counting.states(group))

    def _accumulated(self) -> int:
        if self.counting.micro_batches == 1 or self.engine.keep_ways == 1:
            return 0
        if self.engine.partition_ways:
            return self._partition()
        return sum(one.kept for one in self.parameters.values())

    def _kept(self) -> dict[str, int]:
        """Bytes of each gradient's own share, where shares stay as they come."""
        engine = self.engine
        if engine.keep_ways <= 1 or not engine.keep_width:
            return {}
        unit = self.counting.layout.split_unit
        return {
            row.name: numel(local_shapes([row.shape], engine.keep_ways, unit)) * self.counting.width(role)
            for group in self.counting.groups
            for role, rows in roles_of(group)
            for row in rows
        }

    # ---- units -------------------------------------------------------------------------------------------------

    @cached_property
    def _unit_numbers(self) -> dict[str, int]:
        return {}

    def _unit(self, name: str) -> int:
        """The number of the block that a module or parameter belongs to, ROOT outside of blocks."""
        for prefix in self.blocks.values():
            if name.startswith(prefix):
                number = name[len(prefix) :].partition(".")[0]
                if number.isdigit():
                    return self._unit_numbers.setdefault(prefix + number, len(self._unit_numbers))
        return ROOT

    # ---- stages ------------------------------------------------------------------------------------------------

    def _stages(self) -> list[Stage]:
        gathered = self._gathered()
        last = self._last_of_units()
        closing = max((at for at, row in enumerate(self.stretches) if row.phase == "backward"), default=-1)
        stages = []
        for at, row in enumerate(self.stretches):
            arrival = self._arrival(row, at in last) if row.arrives else None
            stages.append(Stage(gathered[at], row.gradients + row.size, arrival, at == closing))
        return stages

    def _arrival(self, row: Stretch, last: bool) -> Arrival:
        one = self._find(row.arrives)
        return Arrival(one.elements, row.size, one.offset, one.kept, last and one.unit != ROOT, one.unit)

    def _find(self, name: str) -> _Parameter:
        """A parameter by the name that a trace gives it. KeyError for one that is not in the ledger."""
        if name in self.parameters:
            return self.parameters[name]
        return self.parameters[plain_name(name)]

    def _last_of_units(self) -> set[int]:
        last: dict[int, int] = {}
        for at, row in enumerate(self.stretches):
            if row.arrives:
                last[self._find(row.arrives).unit] = at
        return set(last.values())

    def _gathered(self) -> list[int]:
        if self.engine.gather == "module":
            return self._by_module()
        if self.engine.gather == "block":
            return self._by_block()
        return [0] * len(self.stretches)

    def _by_module(self) -> list[int]:
        rows = list(self.parameters.values())
        inside: dict[str, list[int]] = {}
        for one in rows:
            inside.setdefault(one.module, []).append(one.number)
        for name, one in self.parameters.items():
            if plain_name(name) == name and name.rpartition(".")[2].startswith("lora_"):
                # An adapter's matrices are modules of their own.
                inside[one.module].remove(one.number)
                inside[name] = [one.number]
                beside = self.parameters.get(f"{one.module}.weight")
                if name.endswith(READS_WEIGHT) and beside is not None:
                    inside[name].append(beside.number)
        for module, owner in self.tied.items():
            if owner in self.parameters:
                inside.setdefault(module, []).append(self.parameters[owner].number)
        visits: list[list[int]] = []
        visit_of, previous = [], None
        for row in self.stretches:
            key = (row.phase == "backward", plain_name(row.module))
            if key != previous:
                visits.append(inside.get(key[1], []))
                previous = key
            visit_of.append(len(visits) - 1)
        found = by_module(visits, [one.elements for one in rows], [one.whole for one in rows], self.engine)
        first = {number: at for at, number in reversed(list(enumerate(visit_of)))}
        return [self._at(at, found[number], first[number] == at) for at, number in enumerate(visit_of)]

    def _at(self, at: int, gathered: tuple[int, int], arrives: bool) -> int:
        """What is gathered beside the largest moment of a stretch: a module waits before it computes, and where that
        is the larger moment, the difference stands for it."""
        held, waiting = gathered
        row = self.stretches[at]
        return max(held, waiting - (row.activations - row.start)) if arrives else held

    def _by_block(self) -> list[int]:
        sizes: dict[int, int] = {}
        for one in self.parameters.values():
            sizes[one.unit] = sizes.get(one.unit, 0) + one.whole
        visits = [
            BlockVisit(self._unit(row.module), row.phase == "backward", row.phase == "loss") for row in self.stretches
        ]
        order = [sizes.get(unit, 0) for unit in range(len(self._unit_numbers))]
        return by_block(visits, order, sizes.get(ROOT, 0), self.engine)


def _beside_computation(counting: Counting) -> EngineNumbers:
    """The engine where the micro-batch runs: shares of gradients that live elsewhere keep nothing there. Between CPU
    ranks and host memory there is no elsewhere: their shares stay in the memory that the activations are in."""
    engine, place = counting.layout.engine, counting.site.place
    moved = engine.keep_ways > 1 and counting.site.homes.get("gradients", place) != place
    return dataclasses.replace(engine, keep_ways=0) if moved else engine


def plain_name(name: str) -> str:
    """The ledger's name of an adapter's matrix: without PEFT's adapter name, embeddings' like others."""
    if ".lora_" not in name:
        return name
    for ending in _ADAPTER_ENDINGS:
        if name.endswith(ending):
            name = name.removesuffix(ending)
            break
    return name.replace(".lora_embedding_", ".lora_")


__all__ = ["Stages", "gathered_width", "plain_name"]
