"""What a layout adds to the work of a step: collectives, the optimizer's bytes, and traffic with the host.

The layout is numbers only (split so many ways, living where); which engine it is, is not asked.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from memfit.physics.speed import Number, StepWork
from memfit.specs.plan import Layout

# Backward is two thirds of the products of forward and backward; an all-reduce runs beside that of the last
# micro-batch. Source: torch.nn.parallel:DistributedDataParallel (no_sync before the last one).
_BACKWARD = 2 / 3
# DeepSpeedCPUAdam reads gradients in fp32 and writes a copy in the dtype of computation.
_HOST_GRADIENT = 4


@dataclass(frozen=True)
class States:
    """Elements and the bytes of one: `elements` of all parameters, `learning` of those that learn.

    `width` as gathered and computed with, `gradient` as reduced, `master` as the optimizer steps it (`width` where
    there is no copy), `moments` of all its states together. `modules`: those with parameters of their own, visited by
    an engine that gathers module by module.
    """

    elements: Number
    learning: Number
    width: float
    gradient: float
    master: float
    moments: float
    modules: Number = 0


@dataclass(frozen=True)
class Ranks:
    """How many ranks, how many of them on one node, and whether the engine's collectives run beside computation."""

    count: int
    on_node: int
    overlaps: bool = False


def with_layout(work: StepWork, states: States, layout: Layout, ranks: Ranks) -> StepWork:
    """The step with what the layout moves; `work` is of one micro-batch and says how many there are."""
    weights, gradients = states.width * states.elements, states.gradient * states.learning
    whole = layout.split_parameters == 1
    added: dict[str, Number] = {"ranks": ranks.count, "hidden_links": 1.0 if ranks.overlaps else 0.0}
    if not whole:  # gathered for forward and again for backward, which computes forward again meanwhile
        added["gathered_bytes"] = 2 * weights
        if layout.engine.gather == "module":
            added["engine_calls"] = 3 * states.modules
    if layout.split_gradients > 1:
        added["scattered_bytes"] = gradients
    elif layout.split_optimizer > 1:
        added["step_scattered_bytes"] = gradients
    elif ranks.count > 1:
        added |= {"step_reduced_bytes": gradients, "link_window": _BACKWARD / work.micro_batches}
    if whole and layout.split_optimizer > 1:
        added["step_gathered_bytes"] = states.width * states.learning
    added |= _optimizer(states, layout, ranks)
    if layout.home_parameters != "gpu":
        added["up_bytes"] = 2 * weights / layout.split_parameters
    return dataclasses.replace(work, **added)


def _optimizer(states: States, layout: Layout, ranks: Ranks) -> dict[str, Number]:
    """The optimizer's step where its states live: read weight, gradient and states, write weight and states."""
    own = states.learning / layout.split_optimizer
    stepped = states.master + states.moments
    if layout.home_optimizer == "gpu":
        copied = states.width if states.master != states.width else 0  # the weights that are computed with
        return {"optimizer_bytes": own * (2 * stepped + states.gradient + copied)}
    # Each rank sends its share of gradients and fetches its share of new weights; the node's ranks step together.
    return {
        "step_down_bytes": own * states.gradient,
        "step_up_bytes": own * states.width,
        "host_optimizer_bytes": own * ranks.on_node * (2 * stepped + _HOST_GRADIENT + states.width),
    }
