"""What watching a few optimizer steps from within shows, by the names of the model's own modules and parameters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

OUTSIDE = ""  # the part of what runs outside every module: the loss


@dataclass
class Seen:
    """Counts of one rank over all watched steps.

    `steps`, `forwards`: optimizer steps and forwards of the whole model. `calls`, `again`: calls of each module in
    forward, and once more in backward. `graph`: modules whose output was part of a graph. `idle_graph`: of these, those
    of frozen parts before anything that learns (part -> modules); `idle_bytes`: what autograd saved there.
    `kernels`: (part, attention kernel) -> calls in forward. `products_again`: products with weights and attention that
    were computed a second time, by part. `autocast`: (part, dtype or "off") -> calls of blocks. `computes`: (part,
    dtype) -> products with weights in forward. `logits`: the largest tensor saved for backward whose last side is the
    vocabulary, as (bytes, shape, dtype). `gradients`: parameter -> (dtype, device) of its gradient;
    `moving`: those whose gradient was not zero in some micro-batch. `delta_layers`: calls of gated delta layers in
    forward. `pictures`: some forward brought pixels. `training`: whether the model was in training mode.
    """

    steps: int = 0
    forwards: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    graph: set[str] = field(default_factory=set)
    idle_graph: dict[str, set[str]] = field(default_factory=dict)
    idle_bytes: Counter[str] = field(default_factory=Counter)
    kernels: Counter[tuple[str, str]] = field(default_factory=Counter)
    products_again: Counter[str] = field(default_factory=Counter)
    autocast: Counter[tuple[str, str]] = field(default_factory=Counter)
    computes: Counter[tuple[str, str]] = field(default_factory=Counter)
    logits: tuple[int, tuple[int, ...], str] | None = None
    gradients: dict[str, tuple[str, str]] = field(default_factory=dict)
    moving: set[str] = field(default_factory=set)
    delta_layers: int = 0
    pictures: bool = False
    training: bool = True
