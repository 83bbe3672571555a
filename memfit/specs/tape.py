"""A traced step as a program: its events in order, with sizes as functions and loops whose rounds are counted.

Playing it at some rows and tokens gives the events that a trace of that micro-batch would give, without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from memfit.specs.trace import Device

# Which round of a loop made the storage that an event is about, seen from the event:
# "single" outside loops; "same" this round + by; "back" counted from the last round: rounds - 1 - this round + by;
# "first" round number by; "last" the last round + by (by <= 0). A loop's rounds are numbered from 0.
Way = Literal["single", "same", "back", "first", "last"]


class SizeTerm(NamedTuple):
    """`numerator` / `denominator` x the monomial of that name (`memfit.physics.size_functions`)."""

    numerator: int
    denominator: int
    monomial: str


SizeFunction = tuple[SizeTerm, ...]  # their sum


class Reference(NamedTuple):
    """The storage that slot `slot` made, in the round that `way` and `by` tell."""

    slot: int
    way: Way
    by: int


class Slot(NamedTuple):
    """One event of the program, or a mark: here a block begins.

    `size` is the number of a function for events that make a storage, else None. `about`: the storage that a free or a
    gradient is about; three where the first, the middle and the last rounds of a loop differ, else one or none. A mark
    has the kind "mark", its part as `path` and its block as `op`.
    """

    kind: str
    phase: str
    path: str
    op: str
    size: int | None
    about: tuple[Reference, ...]


class Loop(NamedTuple):
    """Slots [first, last) run as often as function number `rounds` says."""

    first: int
    last: int
    rounds: int


# Kernels and chunked linear attention work in multiples of at most this many tokens, and pad what is left over: a
# length that is a multiple runs other operators than one that is not.
WHOLE = 64


@dataclass(frozen=True)
class Domain:
    """Rows and tokens between which a tape was held against traces.

    `padded`: False holds for lengths that are multiples of WHOLE, True for all others, None for both.
    """

    rows: tuple[int, int]
    tokens: tuple[int, int]
    padded: bool | None = None

    def holds(self, rows: int, tokens: int) -> bool:
        """Whether the tape may be played at these sizes."""
        within = self.rows[0] <= rows <= self.rows[1] and self.tokens[0] <= tokens <= self.tokens[1]
        return within and self.padded in (None, bool(tokens % WHOLE))


@dataclass(frozen=True)
class Tape:
    """A program of slots; everything else as in a recording (`memfit.trace.recording`).

    `inputs` is the number of a function; `flops`: (phase, module path, number of a function). `folds`: (part, kinds,
    stands) of `memfit.trace.folds`. `held_out`: the (rows, tokens) at which traces that no function saw were equal to
    the byte.
    """

    domain: Domain
    device: Device
    substitutions: tuple[str, ...]
    parameters: int
    functions: tuple[SizeFunction, ...]
    slots: tuple[Slot, ...]
    loops: tuple[Loop, ...]
    inputs: int
    flops: tuple[tuple[str, str, int], ...]
    folds: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    held_out: tuple[tuple[int, int], ...]
