"""The 90% interval of a forecast: how wrong each kind of term may be, and what that makes of the sum.

Terms of one class are wrong together (one cause moves them all), so their widths add; classes are independent of one
another, so theirs add in squares, above and below apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from memfit.specs.ledger import Term
from memfit.specs.plan import Interval

LEVEL = 0.9


@dataclass(frozen=True)
class Width:
    """Shares of a term by which 90% of measurements are expected to be below and above it, and why."""

    below: float
    above: float
    why: str


# To be calibrated against benchmarks/accuracy_cpu and, for what only a GPU has, benchmarks/accuracy_gpu.
WIDTHS: dict[str, Width] = {
    "exact": Width(0.0, 0.0, "counted from the model's own parameters and checked against live tensors to the byte"),
    "traced": Width(
        0.05,
        0.05,
        "a trace differs from the profiler by 0.1% on the same device; kernels of another may differ by more",
    ),
    "traced-here": Width(
        0.000003,
        0.000003,
        "of the device that traces: nine in ten of both grids of benchmarks/accuracy_cpu are closer, with one thread",
    ),
    "engine": Width(0.10, 0.10, "follows upstream's source; order and overlap of collectives vary between runs"),
    "allocator": Width(
        0.5, 0.5, "a replay on addresses of our own; streams and unequal batches change what stays cached"
    ),
    "context": Width(0.3, 1.2, "published figures go from 128 MiB to 1.4 GB, by driver, GPU and libraries"),
    "comm": Width(0.5, 1.0, "published figures go from 512 MiB to 1.6 GB a communicator"),
    "host": Width(0.15, 0.25, "measured on one machine; ranks of other set-ups there were within 0.30 to 0.39 GB"),
    "host-cuda": Width(0.5, 4.0, "cited; whole CUDA processes are shown at up to 1.6 GB, models included"),
    "memory": Width(0.5, 0.5, "a fact from memory, not looked up"),
    "evaluation": Width(0.3, 0.1, "an upper bound of what a forward without a graph holds"),
}
EXACT = {"weights", "gradients", "gradient_copies", "master", "optimizer", "paged", "quant", "buffers", "reduce_bucket"}
TRACED = {"batch", "activations", "transient", "so_far"}


def uncertainty(term: Term) -> str:
    """The class of a term, a key of WIDTHS."""
    pieces = term.id.split(".")
    if "verified: memory" in term.source:
        return "memory"
    if term.place in ("context", "comm"):
        return str(term.place)
    if term.id in ("rounding", "allocator.cached"):
        return "allocator"
    if pieces[0] == "host":
        return "host-cuda" if term.id == "host.cuda" else "host"
    if pieces[-1] == "evaluate":
        return "evaluation"
    if TRACED & set(pieces):
        return "traced"
    return "exact" if EXACT & set(pieces) else "engine"


def interval_of(terms: list[Term], here: bool = False) -> Interval:
    """The interval of the sum of `terms`. `here`: the trace ran on the kind of device that the run uses, a CPU."""
    sums = dict.fromkeys(WIDTHS, 0)
    for term in terms:
        name = uncertainty(term)
        sums["traced-here" if here and name == "traced" else name] += term.bytes
    total = sum(term.bytes for term in terms)
    below = math.sqrt(sum((WIDTHS[name].below * size) ** 2 for name, size in sums.items()))
    above = math.sqrt(sum((WIDTHS[name].above * size) ** 2 for name, size in sums.items()))
    return Interval(low_bytes=max(0, math.floor(total - below)), high_bytes=math.ceil(total + above), level=LEVEL)
