"""What people ask of every plan: how long samples may be, how many crops may stay, what more or less hardware does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from memfit.catalog.gpus import GPUS
from memfit.catalog.precisions import PRECISIONS, supported
from memfit.errors import UserError
from memfit.families.budget import pinned_knob
from memfit.planner.answer import gives, would_of
from memfit.planner.longest import Grid, largest
from memfit.planner.search import ALLOWED_TIER, Fit, Limits
from memfit.planner.verdict import gpu_room, host_room
from memfit.specs.hardware import GpuRow, Hardware
from memfit.specs.plan import Forecast, Plan
from memfit.specs.recipe import HardwareKeys
from memfit.specs.search import Answer
from memfit.trace.forecast import forecast_plan, trace_batch
from memfit.trace.longer import Knob, image_knob, length_knob
from memfit.trace.planning import Data, Say, search_of
from memfit.trace.prepare import Prepared
from memfit.units import duration

ROUGH = 0.08  # share of a length to within which a question is answered


def answers(prepared: Prepared, plan: Plan, data: Data, say: Say) -> Iterator[Answer]:
    """The answers for a chosen plan, one at a time."""
    with_plan = dataclasses.replace(prepared, recipe=plan.recipe)
    yield from _length(with_plan, data, say)
    yield from _crops(with_plan, data, say)
    gpu = prepared.hardware.gpu
    if gpu is not None and gpu.verified != "detected":
        yield from _one_more(prepared, plan, data, say)
        yield from _smallest(prepared, gpu, data, say)


def _length(prepared: Prepared, data: Data, say: Say) -> Iterator[Answer]:
    knob = length_knob(prepared, data, beyond=True)
    here = max(knob.grid.low, data.longest or _tokens(prepared))
    grid = dataclasses.replace(knob.grid, low=min(here, knob.grid.high), share=ROUGH)
    found = largest(_spare(knob, say), grid)
    if found is None:
        return
    if found >= grid.high:
        text = f"up to {found:,} tokens, the model's whole context"
    else:
        text = f"up to about {found:,} tokens with this plan (goal: long looks for other levers)"
    yield Answer("how long may my samples be?", text, found)


def _tokens(prepared: Prepared) -> int:
    """Tokens of the worst sample without data, as forecasts take it."""
    return max(trace_batch(prepared, prepared.recipe, ()).rows)


def _crops(prepared: Prepared, data: Data, say: Say) -> Iterator[Answer]:
    if prepared.family.images is None:
        return
    question = "how many crops may I keep?"
    if pinned_knob(prepared.recipe.image) is None:
        yield Answer(question, "all that the processor cuts: this plan was made with its own setting")
        return
    knob = image_knob(prepared, data)
    found = largest(_spare(knob, say), knob.grid)
    if found is None:
        return
    whole = found >= knob.grid.high
    tail = ", all that the processor cuts of such a picture" if whole else " with this plan"
    yield Answer(question, f"{knob.key} {found:,}{tail}", found)


def _spare(knob: Knob, say: Say) -> Callable[[int], float]:
    """Bytes that a plan leaves over at a value of the knob, in the memory that is fullest; negative where they lack."""

    def spare(value: int) -> float:
        say(f"trying {knob.key} {value:,}")
        prepared, data = knob.at(value)
        try:
            micro = int(prepared.recipe.levers.micro_batch)
            forecast = forecast_plan(prepared, data.rows(micro), data.load(micro)).forecast
        except UserError:
            return -1.0
        return left_over(forecast)

    return spare


def left_over(forecast: Forecast) -> float:
    """Bytes that are left where least are; negative where the forecast does not fit."""
    rooms = [room for room in (gpu_room(forecast), host_room(forecast)) if room is not None]
    least = min((room.capacity - room.needed for room in rooms), default=0)
    return float(min(least, -1)) if forecast.fits is False else float(max(least, 0))


def _one_more(prepared: Prepared, plan: Plan, data: Data, say: Say) -> Iterator[Answer]:
    """The next number of GPUs that divides the batch."""
    hardware, recipe = prepared.hardware, prepared.recipe
    each = hardware.gpus_per_node
    micro = 1 if recipe.levers.micro_batch == "auto" else int(recipe.levers.micro_batch)
    counts = range(each + 1, 2 * each + 1)
    fit_in = [n for n in counts if recipe.batch == "auto" or int(recipe.batch) % (n * hardware.nodes * micro) == 0]
    if not fit_in:
        return
    more = dataclasses.replace(hardware, gpus_per_node=fit_in[0])
    fit = _on(prepared, more, data, say)
    before = plan.forecast.speed
    if fit is None or fit.forecast.speed is None or before is None:
        return
    # By sample: a batch that is auto grows with the GPUs.
    rate = int(fit.forecast.recipe.batch) / fit.forecast.speed.step_seconds
    gain = rate / (int(plan.recipe.batch) / before.step_seconds)
    what = "one more GPU" if fit_in[0] == each + 1 else f"{fit_in[0] - each} more GPUs (what divides the batch)"
    step = duration(fit.forecast.speed.step_seconds)
    text = f"{more.text}: {gain:.2f} times the samples a second, {step} a step of {fit.forecast.recipe.batch}"
    yield Answer(f"what do {what} buy?".replace("do one more GPU buy", "does one more GPU buy"), text)


def _smallest(prepared: Prepared, gpu: GpuRow, data: Data, say: Say) -> Iterator[Answer]:
    """The fewest of these cards, and the smallest card of which as many do."""
    hardware, found = prepared.hardware, []
    fewer = [n for n in range(1, hardware.gpus_per_node) if _divides(prepared, n * hardware.nodes)]
    for count in fewer:
        fit = _on(prepared, dataclasses.replace(hardware, gpus_per_node=count), data, say)
        if fit is not None:
            found.append((dataclasses.replace(hardware, gpus_per_node=count), fit))
            break
    cards = [row for row in _sizes(hardware) if row.capacity_bytes < gpu.capacity_bytes]
    fits: dict[int, Fit | None] = {}

    def spare(place: int) -> float:
        fits[place] = _on(prepared, dataclasses.replace(hardware, gpu=cards[-1 - place]), data, say)
        return 1.0 if fits[place] else -1.0

    if cards:
        place = largest(spare, Grid(0, len(cards) - 1))
        fit = fits.get(place) if place is not None else None
        if place is not None and fit is not None:
            found.append((dataclasses.replace(hardware, gpu=cards[-1 - place]), fit))
    if found:
        text = "; or ".join(f"{machine.text} ({gives(fit.forecast)})" for machine, fit in found)
    else:
        text = f"{hardware.text}: neither fewer of these cards nor a smaller one of the catalogue does"
    yield Answer("what is the smallest hardware for this recipe?", text)


def _divides(prepared: Prepared, ranks: int) -> bool:
    recipe = prepared.recipe
    micro = 1 if recipe.levers.micro_batch == "auto" else int(recipe.levers.micro_batch)
    return recipe.batch == "auto" or int(recipe.batch) % (ranks * micro) == 0


def _sizes(hardware: Hardware) -> list[GpuRow]:
    """One card of every usable size, smallest first; of equal ones the first of the catalogue with known rates."""
    rows = [row for row in GPUS if row.speed is not None]
    rows = [row for row in rows if supported(PRECISIONS["bf16-amp"], dataclasses.replace(hardware, gpu=row))]
    found: dict[int, GpuRow] = {}
    for row in rows:
        found.setdefault(row.nominal_gib, row)
    return [found[size] for size in sorted(found)]


def _on(prepared: Prepared, hardware: Hardware, data: Data, say: Say) -> Fit | None:
    """The fastest plan on other hardware within `allow`; None where none fits."""
    say(f"trying {hardware.text}")
    keys = HardwareKeys(gpus=hardware.text, host_memory=hardware.host_memory_bytes, nvme=hardware.nvme_bytes)
    recipe = dataclasses.replace(prepared.recipe, hardware=keys)
    allowed = ALLOWED_TIER[recipe.allow]
    limits = Limits(lambda setup, step: max(setup.tier, step.tier) <= allowed and not would_of(setup, step), 1)
    try:
        fits = search_of(dataclasses.replace(prepared, recipe=recipe, hardware=hardware), data, say).run(limits).fits
    except UserError:
        return None
    return fits[0] if fits else None
