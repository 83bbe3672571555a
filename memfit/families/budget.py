"""Shared by the families' budget rules: which knob of the image budget is pinned, and its refusals."""

from __future__ import annotations

from memfit.errors import UserError
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
