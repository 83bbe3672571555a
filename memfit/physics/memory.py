"""Bytes of states: weights, gradients, master copies, optimizer states, quantised weights.

Pure functions of numbers: every field of `PartStates` may be an int or a numpy array of candidates. What a strategy or
a precision means has become counts and widths before it comes here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memfit.specs.ledger import PHASES, Place, Term

Shape = tuple[int, ...]
ALWAYS = PHASES
# Optimizer states appear at the first step and stay: from then on they are alive in every phase but load.
FROM_FIRST_STEP = tuple(phase for phase in PHASES if phase != "load")
# zero_grad(set_to_none=True) after the step frees the gradients, before evaluation and saving.
# A flat group is padded to a multiple of this many elements a rank.
# Source: deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer (nccl_start_alignment_factor).
FLAT_ALIGNMENT = 2
ONE_MICRO_BATCH = ("backward", "step")
SEVERAL_MICRO_BATCHES = ("forward", "loss", "backward", "step")


def share(count: Any, ways: Any) -> Any:
    """The larger share when `count` is divided `ways` ways: rounded up."""
    return -(-count // ways)


def local_shapes(shapes: Sequence[Shape], ways: int, unit: str) -> tuple[Shape, ...]:
    """Shapes of the worst rank's tensors when `shapes` are split `ways` ways by `unit` (see `specs.plan.Layout`)."""
    if ways == 1:
        return tuple(shapes)
    if unit == "part":
        total = numel(shapes)
        return ((FLAT_ALIGNMENT * share(total, FLAT_ALIGNMENT * ways),),) if total else ()
    if unit == "tensor":
        return tuple([(-(-math.prod(shape) // ways),) for shape in shapes])
    if unit == "rows":
        return tuple((share(shape[0], ways), *shape[1:]) if shape else shape for shape in shapes)
    raise ValueError(f"unknown unit {unit!r}")


def largest_touched(counts: Sequence[int], own: int, ways: int) -> int:
    """Elements of all tensors that reach into one rank's share of `own`, whole, on the rank where they are the most.

    `counts`: elements of the tensors that lie end to end.
    """
    sums = [0] * ways
    place = 0
    for count in counts:
        first, last = place // own, (place + count - 1) // own
        for rank in range(first, min(last, ways - 1) + 1):
            sums[rank] += count
        place += count
    return max(sums)


def numel(shapes: Sequence[Shape]) -> int:
    """Elements of all tensors together."""
    return sum(map(math.prod, shapes))


def packed_bytes(count: Any) -> Any:
    """Bytes of a tensor of `count` 4-bit weights, two in a byte."""
    return share(count, 2)


def scale_bytes(count: Any, block: int, width: int, nested_block: int | None, nested_bytes: int) -> Any:
    """Bytes of a 4-bit tensor's scales: one of `width` bytes a block, and with nesting an fp32 one for their blocks."""
    blocks = share(count, block)
    nested = 0 if nested_block is None else 4 * share(blocks, nested_block) + nested_bytes
    return blocks * width + nested


@dataclass(frozen=True)
class PartStates:
    """What one rank holds of one part in one `role`: "" (the model's own tensors), "adapter" or "saved" (full copies).

    Counts are elements, widths are bytes of an element (`gradient_width` None: as `width`); `packed`, `optimizer` and
    `paged` are bytes. The latter two are counted by the optimizer's row, which also words `optimizer_formula`.
    """

    part: str
    role: str = ""
    frozen: Any = 0
    frozen_width: int = 0
    packed: Any = 0
    learning: Any = 0
    idle: Any = 0
    idle_width: int = 0
    width: int = 0
    gradients: Any = 0
    gradient_width: Any = None
    gradient_copies: Any = 0
    master: Any = 0
    master_width: int = 0
    optimizer: Any = 0
    paged: Any = 0
    optimizer_formula: str = ""

    @property
    def _gradient_width(self) -> Any:
        return self.width if self.gradient_width is None else self.gradient_width

    def bytes(self) -> dict[str, Any]:
        """Bytes of each kind of state on one rank."""
        return {
            "weights": self.packed
            + self.frozen * self.frozen_width
            + self.idle * self.idle_width
            + self.learning * self.width,
            "gradients": self.gradients * self._gradient_width,
            "gradient_copies": self.gradient_copies * self.width,
            "master": self.master * self.master_width,
            "optimizer": self.optimizer,
            "paged": self.paged,
        }


@dataclass(frozen=True)
class Site:
    """Where states are counted: on a GPU those of its one rank, in host memory and on disk those of all ranks of the
    node. `homes`: kinds of states that live elsewhere than `place`.
    """

    place: Place
    ranks_per_node: int = 1
    homes: Mapping[str, Place] = field(default_factory=dict)

    def ranks(self, place: Place) -> int:
        """How many ranks share this place."""
        return self.ranks_per_node if place in {"host", "disk"} else 1


@dataclass(frozen=True)
class Lifetimes:
    """The phases in which each kind of state is alive."""

    gradients: tuple[str, ...]
    gradient_copies: tuple[str, ...]

    def of(self, kind: str) -> tuple[str, ...]:
        if kind in {"optimizer", "paged"}:
            return FROM_FIRST_STEP
        return {"gradients": self.gradients, "gradient_copies": self.gradient_copies}.get(kind, ALWAYS)


def lifetimes(micro_batches: int, resident: Sequence[str] = (), gradients_end: str = "step") -> Lifetimes:
    """With one micro-batch a step no gradient lives during forward; with more they do. `resident` ones never go.

    `gradients_end`: the last phase of whole gradients, "backward" or "step".
    """
    usual = ONE_MICRO_BATCH if micro_batches == 1 else SEVERAL_MICRO_BATCHES
    whole = usual if gradients_end == "step" else tuple(phase for phase in usual if phase != "step")
    return Lifetimes(
        gradients=ALWAYS if "gradients" in resident else whole,
        gradient_copies=ALWAYS if "gradient copies" in resident else usual,
    )


_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "gradient_copies": "second copy of the gradients",
    "master": "master weights",
    "optimizer": "optimizer states",
    "paged": "optimizer states in paged memory",
}
_ROLES = {"": "", "adapter": " of the adapters", "saved": " of the modules saved in full"}


def state_terms(states: PartStates, alive: Lifetimes, site: Site, sources: dict[str, str]) -> list[Term]:
    """The terms of one part and role that are not zero. `sources` gives the source of each kind of state."""
    terms = []
    for kind, count in states.bytes().items():
        place: Place = "host" if kind == "paged" else site.homes.get(kind, site.place)
        name = f"{_NAMES[kind]}{_ROLES[states.role]}, {states.part}"
        if count:
            terms.append(
                Term(
                    id=".".join(filter(None, (states.role, kind, states.part))),
                    name=name,
                    part=states.part,
                    place=place,
                    alive=alive.of(kind),
                    bytes=int(count) * site.ranks(place),
                    source=sources[kind],
                    formula=_formula(kind, states) + _of_ranks(site.ranks(place)),
                )
            )
    return terms


def _of_ranks(ranks: int) -> str:
    return "" if ranks == 1 else f", x {ranks} ranks of the node"


def _formula(kind: str, states: PartStates) -> str:
    """The sum behind a term, with its numbers."""
    if kind == "weights":
        pieces = [
            f"{states.packed:,} B of 4-bit weights" if states.packed else "",
            f"{states.frozen:,} frozen x {states.frozen_width} B" if states.frozen else "",
            f"{states.learning:,} that learn x {states.width} B" if states.learning else "",
            f"{states.idle:,} without a gradient x {states.idle_width} B" if states.idle else "",
        ]
        return " + ".join(filter(None, pieces))
    if kind == "gradients":
        return f"{states.gradients:,} x {states._gradient_width} B"
    if kind == "gradient_copies":
        return f"{states.gradient_copies:,} x {states.width} B"
    if kind == "master":
        return f"{states.master:,} x {states.master_width} B"
    return states.optimizer_formula
