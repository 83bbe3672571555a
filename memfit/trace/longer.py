"""`goal: long`: the longest samples, or the largest image budget, that any set-up of the lowest tier holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from memfit.errors import UserError
from memfit.families.budget import pinned_knob
from memfit.planner.answer import would_of
from memfit.planner.longest import Grid, largest
from memfit.planner.search import ALLOWED_TIER, Limits
from memfit.specs.recipe import Recipe, WorkloadKeys
from memfit.specs.trace import Row
from memfit.specs.workload import ImageCost
from memfit.trace.forecast import DEFAULT_SIZE
from memfit.trace.planning import Data, Say, search_of
from memfit.trace.prepare import Prepared, prepare

UNIT = 64  # tokens: lengths are looked for in multiples of this
CLOSE = 0.01  # share of a length to within which the longest is found


@dataclass(frozen=True)
class Knob:
    """What is made longer: the recipe's key, the values it may take, and the recipe and data at one of them.

    `whole`: what it means that the highest value fits: nothing is lost, and the key stays auto.
    """

    key: str
    grid: Grid
    at: Callable[[int], tuple[Prepared, Data]]
    unit: str
    whole: str


def length_knob(prepared: Prepared, data: Data, beyond: bool = False) -> Knob:
    """`max_length`, up to the longest sample of the data; to the model's context without data, or with `beyond`."""
    context = context_of(prepared.source.config)
    longest = context if beyond else data.longest or context
    pictures = data.heaviest if data.longest else tuple(_pictures(prepared))
    taken = sum(cost.tokens for cost in pictures)
    least = min(longest, -(-(taken + UNIT) // UNIT) * UNIT)

    def at(value: int) -> tuple[Prepared, Data]:
        recipe = prepared.recipe
        if isinstance(recipe.workload, WorkloadKeys):
            recipe = dataclasses.replace(recipe, workload=dataclasses.replace(recipe.workload, tokens=value))
        changed = dataclasses.replace(prepared, recipe=dataclasses.replace(recipe, max_length=value))
        if not data.longest:
            return changed, data
        # No sample that is shortened is longer, or shows more than the one with the most patches.
        row = Row(value, pictures, None)
        return changed, dataclasses.replace(data, rows=lambda micro: (row,) * micro)

    whole = "the longest sample fits, so that nothing is cut" if data.longest else "the model's whole context fits"
    return Knob("max_length", Grid(least, longest, UNIT, CLOSE), at, "tokens", whole)


def image_knob(prepared: Prepared, data: Data) -> Knob:
    """The image budget: slices where the family's models count them, image tokens where not."""
    pictures = data.pictures if data.longest else tuple(_pictures(prepared, own=True))
    crops = max((len(cost.crops) - 1 for cost in pictures), default=0)
    tokens = max((cost.tokens for cost in pictures), default=0)
    name, high, low = ("max_slices", crops, 1) if _takes(prepared, "max_slices") else ("max_tokens", tokens, UNIT)

    def at(value: int) -> tuple[Prepared, Data]:
        budget: dict[str, Any] = {"max_slices": "auto", "max_pixels": "auto", "max_tokens": "auto"} | {name: value}
        image = dataclasses.replace(prepared.recipe.image, **budget)
        recipe = dataclasses.replace(prepared.recipe, image=image)
        return prepare(recipe, catalogue=True), data.under(recipe) if data.under else data

    grid = Grid(min(low, max(1, high)), max(1, high), 1 if name == "max_slices" else 16)
    unit = "slices" if name == "max_slices" else "image tokens"
    return Knob(
        f"image.{name}", grid, at, unit, "every picture fits as the processor takes it, so that nothing is lost"
    )


def knob_of(prepared: Prepared, data: Data) -> Knob:
    """What a recipe with `goal: long` leaves open. UserError where it leaves nothing open."""
    recipe = prepared.recipe
    if recipe.max_length == "auto":
        return length_knob(prepared, data)
    if prepared.family.images is not None and pinned_knob(recipe.image) is None:
        return image_knob(prepared, data)
    raise UserError(
        "goal: long looks for the longest max_length or the largest image budget, and the recipe pins what there is",
        "max_length: auto, or goal: fast",
    )


def longest(prepared: Prepared, data: Data, say: Say) -> tuple[Prepared, Data, str]:
    """The recipe at the largest value that any set-up of the lowest tier holds, its data, and the reason in a line.

    Where not even the smallest value fits, the recipe as it is: its search then says what lacks.
    """
    knob = knob_of(prepared, data)
    allowed = ALLOWED_TIER[prepared.recipe.allow]
    tiers: list[int] = []

    def spare(value: int) -> float:
        say(f"goal long: {knob.key} {value}")
        changed, rows = knob.at(value)
        most = tiers[0] if tiers else allowed
        limits = Limits(lambda setup, step: max(setup.tier, step.tier) <= most and not would_of(setup, step), 1)
        try:
            fits = search_of(changed, rows, say).run(limits).fits
        except UserError:
            return -1.0  # pictures that do not fit in so few tokens
        if fits and not tiers:
            tiers.append(fits[0].candidate.tier)
        return 1.0 if fits else -1.0

    found = largest(spare, knob.grid)
    if found is None:
        return _goal_reached(prepared), data, f"goal long: not even {knob.key} {knob.grid.low} fits"
    tier = f"in tier {tiers[0]}"
    if found >= knob.grid.high:
        if knob.key == "max_length" and not data.longest:
            changed, rows = knob.at(found)
            return _goal_reached(changed), rows, f"goal long: {knob.whole} {tier}, {found:,} tokens"
        return _goal_reached(prepared), data, f"goal long: {knob.key} stays auto: {knob.whole}"
    changed, rows = knob.at(found)
    near = f" (to within {CLOSE:.0%})" if knob.grid.share else ""
    return _goal_reached(changed), rows, f"goal long: {knob.key} {found:,} is the most that fits {tier}{near}"


def _goal_reached(prepared: Prepared) -> Prepared:
    """What goal long chose stands in the recipe now, so that what is left is to be fast."""
    return dataclasses.replace(prepared, recipe=dataclasses.replace(prepared.recipe, goal="fast"))


def context_of(config: Any) -> int:
    """Positions that the language model was made for: its config's, wherever it stands in it."""
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(name), dict) and "max_position_embeddings" in config[name]:
            return int(config[name]["max_position_embeddings"])
    return int(config.get("max_position_embeddings", 32_768))


def _pictures(prepared: Prepared, own: bool = False) -> Iterator[ImageCost]:
    """The pictures of the worst sample without data; `own`: under the processor's own budget."""
    rule, recipe = prepared.family.images, prepared.recipe
    if rule is None:
        return
    keys = recipe.workload if isinstance(recipe.workload, WorkloadKeys) else WorkloadKeys()
    image = dataclasses.replace(recipe.image, max_slices="auto", max_pixels="auto", max_tokens="auto")
    budget = image if own else recipe.image
    settings = rule.budget(prepared.source.config, prepared.source.preprocessor, budget)
    width, height = map(int, (keys.image_size or DEFAULT_SIZE).split("x"))
    for _ in range(1 if keys.images is None else keys.images):
        yield rule.rule(settings, width, height)


def _takes(prepared: Prepared, name: str) -> bool:
    """Whether the family's processor can be told this budget."""
    recipe: Recipe = prepared.recipe
    budget: dict[str, Any] = {"max_slices": "auto", "max_pixels": "auto", "max_tokens": "auto"} | {name: 1}
    rule = prepared.family.images
    try:
        image = dataclasses.replace(recipe.image, **budget)
        return rule is not None and bool(rule.budget(prepared.source.config, prepared.source.preprocessor, image))
    except UserError:
        return False
