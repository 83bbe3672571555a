"""`memfit plan` on a prepared recipe: search, then what would help where nothing fits."""

from __future__ import annotations

import dataclasses

from memfit.planner.answer import answer, gives
from memfit.planner.plan import plan_of
from memfit.planner.search import WANTED
from memfit.specs.search import SearchResult
from memfit.trace.longer import longest
from memfit.trace.nearest import nearest, taken
from memfit.trace.planning import NO_DATA, Data, Say, search_of
from memfit.trace.prepare import Prepared


def plan_for(
    prepared: Prepared, data: Data = NO_DATA, say: Say = lambda text: None, wanted: int = WANTED
) -> SearchResult:
    """The answer for a recipe; what would make a plan possible is searched only where none is.

    Raises UserError for pins that go together with nothing.
    """
    reason = ""
    if prepared.recipe.goal == "long":
        prepared, data, reason = longest(prepared, data, say)
    result = answer(search_of(prepared, data, say), wanted)
    if result.chosen is None and prepared.recipe.allow == "learning":
        fit = taken(prepared, say)
        if fit is not None:
            reasons = (f"nothing that learns the same fits; allow: learning takes this instead: {gives(fit.forecast)}",)
            plan = dataclasses.replace(plan_of(fit.forecast), tier=3, reasons=reasons)
            result = dataclasses.replace(result, chosen=plan, ranked=(plan,))
    if result.chosen is None:
        return dataclasses.replace(result, nearest=tuple(nearest(prepared, say)))
    if reason:
        plan = dataclasses.replace(result.chosen, reasons=(reason, *result.chosen.reasons))
        result = dataclasses.replace(result, chosen=plan, ranked=(plan, *result.ranked[1:]))
    return result


def choose(prepared: Prepared, data: Data, say: Say) -> SearchResult | None:
    """What `memfit train` runs: the search's choice alone, or None where the recipe leaves nothing to choose."""
    search = search_of(prepared, data, say)
    return answer(search, 1, offering=False) if search.tables.searched > 1 else None
