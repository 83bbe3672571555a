"""Find all that a recipe names: the model's small files, its family, its parameters, the hardware.

Loads no torch unless the model's parameters are not in the cache yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from memfit.catalog.gpus import parse_hardware
from memfit.families import family_for
from memfit.families.base import Family
from memfit.inputs import machine
from memfit.inputs.model_source import ModelSource, find_model
from memfit.planner.estimate import estimate_states
from memfit.planner.plan import plan_of
from memfit.specs.hardware import Hardware
from memfit.specs.plan import Plan
from memfit.specs.profile import Profile
from memfit.specs.recipe import Recipe
from memfit.trace.parameters import profile_of


@dataclass(frozen=True)
class Prepared:
    """A recipe with what it names."""

    recipe: Recipe
    source: ModelSource
    family: Family
    profile: Profile
    hardware: Hardware

    def plan(self) -> Plan:
        """The plan of this recipe. Raises UserError with everything that does not go together."""
        return plan_of(estimate_states(self.recipe, self.profile, self.family, self.hardware))


def prepare(recipe: Recipe, catalogue: bool = False) -> Prepared:
    """Raises UserError for a model that cannot be found, is of no known family, or is refused by transformers.

    With `catalogue` the catalogue's facts stand in for files that are not here (`find_model`).
    """
    hardware = hardware_of(recipe)
    source = find_model(recipe.model, recipe.model_config, catalogue)
    family = family_for(source.config)
    return Prepared(recipe, source, family, profile_of(source.config, family), hardware)


def hardware_of(recipe: Recipe) -> Hardware:
    """The hardware that the recipe states, or this machine's."""
    if recipe.hardware == "auto":
        return machine.detect()
    keys = recipe.hardware
    return parse_hardware(keys.gpus, keys.host_memory, keys.nvme)
