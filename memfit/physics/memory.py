"""Bytes of states: weights, gradients, master copies, optimizer states, quantised weights.

Pure functions of numbers: every field of `PartStates` may be an int or a numpy array of candidates. What a strategy or
a precision means has become counts and widths before it comes here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memfit.specs.ledger import PHASES, Place, Term

Shape = tuple[int, ...]
ALWAYS = PHASES
# Optimizer states appear at the first step and stay: from then on they are alive in every phase but load.
FROM_FIRST_STEP = tuple(phase for phase in PHASES if phase != "load")
# zero_grad(set_to_none=True) after the step frees the gradients, before evaluation and saving.
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
        total = sum(math.prod(shape) for shape in shapes)
        return ((share(total, ways),),) if total else ()
    if unit == "tensor":
        return tuple((share(math.prod(shape), ways),) for shape in shapes)
    if unit == "rows":
        return tuple((share(shape[0], ways), *shape[1:]) if shape else shape for shape in shapes)
    raise ValueError(f"unknown unit {unit!r}")


def numel(shapes: Sequence[Shape]) -> int:
    """Elements of all tensors together."""
    return sum(math.prod(shape) for shape in shapes)


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

    Counts are elements, widths are bytes of an element; `packed`, `optimizer`, `paged` are bytes. The latter two are
    counted by the optimizer's row, which also words `optimizer_formula`.
    """

    part: str
    role: str = ""
    frozen: Any = 0
    frozen_width: int = 0
    packed: Any = 0
    learning: Any = 0
    width: int = 0
    gradients: Any = 0
    gradient_copies: Any = 0
    master: Any = 0
    master_width: int = 0
    optimizer: Any = 0
    paged: Any = 0
    optimizer_formula: str = ""

    def bytes(self) -> dict[str, Any]:
        """Bytes of each kind of state on one rank."""
        return {
            "weights": self.packed + self.frozen * self.frozen_width + self.learning * self.width,
            "gradients": self.gradients * self.width,
            "gradient_copies": self.gradient_copies * self.width,
            "master": self.master * self.master_width,
            "optimizer": self.optimizer,
            "paged": self.paged,
        }


@dataclass(frozen=True)
class Site:
    """Where states are counted: on a GPU those of its one rank, in host memory those of all ranks of the node."""

    place: Place
    ranks_per_node: int = 1

    def ranks(self, place: Place) -> int:
        """How many ranks share this place."""
        return self.ranks_per_node if place == "host" else 1


@dataclass(frozen=True)
class Lifetimes:
    """The phases in which each kind of state is alive."""

    gradients: tuple[str, ...]
    gradient_copies: tuple[str, ...]

    def of(self, kind: str) -> tuple[str, ...]:
        if kind in {"optimizer", "paged"}:
            return FROM_FIRST_STEP
        return {"gradients": self.gradients, "gradient_copies": self.gradient_copies}.get(kind, ALWAYS)


def lifetimes(micro_batches: int, resident: Sequence[str] = ()) -> Lifetimes:
    """With one micro-batch a step no gradient lives during forward; with more they do. `resident` ones never go."""
    usual = ONE_MICRO_BATCH if micro_batches == 1 else SEVERAL_MICRO_BATCHES
    return Lifetimes(
        gradients=ALWAYS if "gradients" in resident else usual,
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
        place: Place = "host" if kind == "paged" else site.place
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
        ]
        return " + ".join(filter(None, pieces))
    if kind in {"gradients", "gradient_copies"}:
        return f"{getattr(states, kind):,} x {states.width} B"
    if kind == "master":
        return f"{states.master:,} x {states.master_width} B"
    return states.optimizer_formula
