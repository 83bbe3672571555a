"""Find all that a recipe names: the model's small files, its family, its parameters, the hardware.

Loads no torch unless the model's parameters are not in the cache yet.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from memfit.catalog.gpus import parse_hardware
from memfit.families import family_for
from memfit.families.base import Family
from memfit.families.budget import picture_settings
from memfit.inputs import machine
from memfit.inputs.model_source import ModelSource, find_model, overridden
from memfit.planner.estimate import estimate_states
from memfit.planner.plan import plan_of
from memfit.planner.user_engine import with_users_deepspeed
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
    """Raises UserError for a model that cannot be found, is of no known family, is refused by transformers, or cannot
    follow `image`.

    With `catalogue` the catalogue's facts stand in for files that are not here (`find_model`).
    """
    hardware = hardware_of(recipe)
    recipe = with_users_deepspeed(recipe, hardware)
    source = find_model(recipe.model, recipe.model_config, catalogue)
    family = family_for(source.config)
    settings = picture_settings(family, source.config, source.preprocessor, recipe.image)
    shared = family.images.shared if family.images else ()
    source = overridden(source, {name: settings[name] for name in shared})
    return Prepared(recipe, source, family, profile_of(source.config, family), hardware)


def hardware_of(recipe: Recipe) -> Hardware:
    """The hardware that the recipe states, or this machine's.

    CPU ranks run here: where their memory is not stated, it is what this machine or container lets a process use.
    """
    if recipe.hardware == "auto":
        return machine.detect()
    keys = recipe.hardware
    stated = parse_hardware(keys.gpus, keys.host_memory, keys.nvme)
    if stated.gpu is None and stated.nodes == 1 and stated.host_memory_bytes is None:
        return dataclasses.replace(stated, host_memory_bytes=machine.host_memory_bytes())
    return stated
