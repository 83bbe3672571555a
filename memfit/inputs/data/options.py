"""How a recipe wants its data read."""

from __future__ import annotations

from pathlib import Path

from memfit.inputs.data.examine import CheckOptions
from memfit.inputs.data.scan import Progress
from memfit.specs.recipe import Recipe


def check_options(recipe: Recipe, quarantine: Path | None = None, progress: Progress | None = None) -> CheckOptions:
    """The seed and the length limit of a recipe; `quarantine` is the folder for lists of broken rows."""
    limit = recipe.max_length if isinstance(recipe.max_length, int) else None
    return CheckOptions(seed=recipe.seed, max_length=limit, quarantine=quarantine, progress=progress)
