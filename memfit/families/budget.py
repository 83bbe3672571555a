"""Shared by the families' budget rules: which knob of the image budget is pinned, and its refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memfit.errors import UserError
from memfit.families.base import Family
from memfit.specs.recipe import ImageBudget

# A budget in tokens holds for every picture up to this ratio of its sides: beyond it one strip of a long picture
# would force every ordinary picture down (a 6,000 x 1 px picture takes 536 tokens even with slicing off).
# `memfit.inputs.encode` refuses the single picture that still goes over.
WIDEST_RATIO = 20


def pinned_knob(budget: ImageBudget) -> tuple[str, int] | None:
    """The one pinned knob as (name, value), or None when all are auto. UserError for two of them or a value below 1."""
    knobs = {
        "max_slices": budget.max_slices,
        "max_pixels": budget.max_pixels,
        "max_tokens": budget.max_tokens,
    }
    pinned = [(name, value) for name, value in knobs.items() if value != "auto"]
    if len(pinned) > 1:
        named = ", ".join(f"image.{name}: {value}" for name, value in pinned)
        raise UserError(
            f"the image budget has {len(pinned)} knobs pinned ({named}); it takes one",
            f"keep image.{pinned[-1][0]} and set the others to auto",
        )
    if not pinned:
        return None
    name, value = pinned[0]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"image.{name} is {value!r}; it must be a whole number of at least 1", f"image.{name}: auto")
    return name, value


def refuse_downsample_mode(budget: ImageBudget, because: str, hint: str) -> None:
    """UserError where the budget pins a downsample mode, for a family whose models have none."""
    if budget.downsample_mode != "auto":
        raise UserError(f"image.downsample_mode: {budget.downsample_mode} has no effect: {because}", hint)


def picture_settings(
    family: Family, config: Mapping[str, Any], preprocessor: Mapping[str, Any], budget: ImageBudget
) -> dict[str, Any]:
    """The processor's settings with the budget compiled in, {} for a family without pictures.

    UserError for a budget that the family's models cannot follow.
    """
    if family.images is not None:
        return family.images.budget(config, preprocessor, budget)
    name, value = pinned_knob(budget) or ("downsample_mode", budget.downsample_mode)
    if value != "auto":
        kind = config.get("model_type", family.name)
        raise UserError(f"image.{name}: {value} has no effect: a {kind} model takes no pictures", f"image.{name}: auto")
    return {}


def budget_text(budget: ImageBudget) -> str:
    """What a budget pins, as a recipe would say it: "image.max_slices: 4", or "image: auto"."""
    named = [f"image.{name}: {value}" for name, value in vars(budget).items() if value != "auto"]
    return ", ".join(named) or "image: auto"
