"""Terms in a handful of groups, for tables and pictures: what people ask about, not where a term comes from."""

from __future__ import annotations

from collections.abc import Iterable

from memfit.planner.host_terms import PROCESS_PART
from memfit.specs.ledger import Term
from memfit.specs.plan import Forecast

# Group -> pieces of a term's id that belong to it, from what stays longest to what is gone soonest. The first that
# matches counts.
GROUPS: dict[str, tuple[str, ...]] = {
    "weights": ("weights", "quant", "buffers"),
    "optimizer states": ("optimizer", "paged", "master"),
    "gradients": ("gradients", "gradient_copies"),
    "engine": (),
    "batch": ("batch",),
    "activations": ("activations",),
    "temporaries": ("transient", "step"),
    "other": (),
    "allocator": (),
    "context": (),
}
# Parts of a ledger that are no part of the model.
NO_STATES = frozenset({"batch", "activations", "engine", "allocator", "process", PROCESS_PART})


def group_of(term: Term) -> str:
    """The group of a term."""
    if term.place in ("context", "comm"):
        return "context"
    if term.part == "allocator":
        return "allocator"
    if term.part == "engine":
        return "engine"
    if term.part == PROCESS_PART:
        return "other"
    pieces = set(term.id.split("."))
    found = next((group for group, names in GROUPS.items() if pieces & set(names)), None)
    # What an engine does at a traced peak stands with the activations, under the engine's own name.
    return found or ("engine" if term.part == "activations" else "other")


def group_sums(terms: Iterable[Term]) -> dict[str, int]:
    """Bytes of every group."""
    sums = dict.fromkeys(GROUPS, 0)
    for term in terms:
        sums[group_of(term)] += term.bytes
    return sums


def is_state(term: Term) -> bool:
    """Whether a term is a state of the model: weights, gradients, optimizer states, buffers, step temporaries."""
    return term.part not in NO_STATES


def alive_at(forecast: Forecast, place: str, phase: str) -> list[Term]:
    """The terms of a place in a phase; on CPU ranks without what the processes take for themselves."""
    own = forecast.hardware.gpu is None and place == "host"
    return [
        term for term in forecast.ledger.at(place) if phase in term.alive and not (own and term.part == PROCESS_PART)
    ]
