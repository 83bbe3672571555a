"""How memory moves over one key of the recipe: one plan held, forecast at every value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from memfit.errors import MemfitError, UserError
from memfit.inputs.recipe_file import override
from memfit.planner.answer import levers_text
from memfit.specs.plan import Forecast
from memfit.specs.recipe import Recipe
from memfit.specs.search import SearchResult
from memfit.specs.sweep import Sweep, SweepRow

Say = Callable[[str], None]
# Keys whose values a batch that memfit chose must follow.
MOVES_BATCH = ("levers.micro_batch", "hardware.gpus")


@dataclasses.dataclass(frozen=True)
class Held:
    """The plan that stands still: its effective recipe, what the user asked for, and which plan it is in words."""

    recipe: Recipe
    wanted: Recipe
    words: str


def held_plan(result: SearchResult, wanted: Recipe) -> Held:
    """The chosen plan; where nothing fits, the set-up that lacks least; else the documented defaults."""
    if result.chosen is not None:
        return Held(result.chosen.recipe, wanted, "the chosen plan")
    if result.refused:
        levers = result.refused[0].levers
        sets = [f"{key}={_scalar(value)}" for key, value in levers.items()]
        return Held(override(wanted, sets), wanted, f"the closest, which does not fit ({levers_text(levers)})")
    return Held(wanted, wanted, "the documented defaults")


def sweep(
    key: str, values: Sequence[Any], held: Held, forecast: Callable[[Recipe], Forecast], say: Say = lambda text: None
) -> Sweep:
    """The forecast of the held plan at every value. An impossible value is a row with its reason; where every value is
    impossible the first reason is raised."""
    rows: list[SweepRow] = []
    first: MemfitError | None = None
    for number, value in enumerate(values, 1):
        say(f"{key} {value} ({number} of {len(values)})")
        try:
            rows.append(SweepRow(value, forecast(at_value(held, key, value))))
        except MemfitError as error:
            first = first or error
            rows.append(SweepRow(value, None, " ".join(getattr(error, "problem", str(error)).split())))
    if first is not None and all(row.forecast is None for row in rows):
        hint = getattr(first, "hint", "memfit plan without --sweep says more")
        raise UserError(f"--sweep {key}: none of {len(rows)} values is possible; {rows[0].problem}", hint)
    return Sweep(key, tuple(rows), held.words)


def at_value(held: Held, key: str, value: Any) -> Recipe:
    """The held recipe with the key at a value.

    A batch that was auto follows again what it depends on. Over `batch`, a micro-batch that was auto holds all samples
    of a rank, so that what moves is what the key says.
    """
    recipe = held.recipe
    if key in MOVES_BATCH:
        recipe = dataclasses.replace(recipe, batch=held.wanted.batch)
    found = override(recipe, [f"{key}={_scalar(value)}"])
    if key == "batch" and held.wanted.levers.micro_batch == "auto":
        ranks = _ranks(found)
        if ranks and int(found.batch) % ranks == 0:
            levers = dataclasses.replace(found.levers, micro_batch=int(found.batch) // ranks)
            found = dataclasses.replace(found, levers=levers)
    return found


def _ranks(recipe: Recipe) -> int:
    from memfit.trace.prepare import hardware_of

    return hardware_of(recipe).ranks


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
