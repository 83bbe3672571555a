"""The estimate: the ledger of one pinned run.

States are exact; what is not forecast yet is listed in `Ledger.missing`, never counted as zero.
"""

from __future__ import annotations

from memfit.families.base import Family
from memfit.planner.counting import META_SOURCE, Counting
from memfit.planner.defaults import resolve
from memfit.planner.engine_terms import engine_terms
from memfit.planner.parts import parameter_groups, resolve_parts
from memfit.specs.hardware import Hardware
from memfit.specs.ledger import Ledger
from memfit.specs.plan import Forecast
from memfit.specs.profile import Profile
from memfit.specs.recipe import Recipe
from memfit.specs.workload import Workload

__all__ = ["META_SOURCE", "capacity_bytes", "estimate_states", "states_place"]


def estimate_states(
    recipe: Recipe, profile: Profile, family: Family, hardware: Hardware, workload: Workload | None = None
) -> Forecast:
    """The forecast of a recipe's states on the worst rank; `auto` takes the documented defaults.

    Raises UserError with everything that does not go together.
    """
    effective, defaults = resolve(recipe, hardware, family, profile, workload)
    groups = parameter_groups(profile, resolve_parts(effective, family, profile), effective.lora)
    counting = Counting(effective, hardware, groups)
    terms = [term for group in groups for term in counting.group_terms(group)]
    terms += counting.step_terms()
    terms += engine_terms(counting)
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
        layout=counting.layout,
    )


def capacity_bytes(hardware: Hardware) -> int | None:
    """The memory in which the states must fit: of one GPU, or of the node for CPU ranks."""
    return hardware.gpu.capacity_bytes if hardware.gpu else hardware.host_memory_bytes


def states_place(hardware: Hardware) -> str:
    """Where the states are: on the GPU, or in host memory on CPU ranks."""
    return "gpu" if hardware.gpu else "host"


def _exceeds(ledger: Ledger, hardware: Hardware) -> bool:
    capacity = capacity_bytes(hardware)
    return capacity is not None and max(ledger.phase_bytes(states_place(hardware)).values()) > capacity
