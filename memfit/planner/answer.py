"""From what a search found to its answer: plans with reasons, refusals with bytes, offers that were not taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from memfit.physics.speed import TYPICAL_ERROR
from memfit.planner.axes import Setup, Step
from memfit.planner.estimate import capacity_bytes
from memfit.planner.plan import plan_json
from memfit.planner.points import points_json, points_of
from memfit.planner.search import ALLOWED_TIER, Candidate, Fit, Limits, Miss, Outcome, Search, best_misses, shortfall_of
from memfit.planner.sweep_text import sweep_json
from memfit.planner.verdict import host_room
from memfit.planner.work import rates_for
from memfit.specs.plan import Forecast, Plan
from memfit.specs.search import Offer, Refused, SearchResult
from memfit.strategies import STRATEGIES
from memfit.units import duration, gib

TIERS = {1: "the result stays the same", 2: "rounding changes", 3: "what is learned changes"}
PLACES = {"gpu": "on the GPU", "host": "in host memory"}
# So many refusals are judged whole, so that their figure is the allocator's to the byte; so many faster ones are named.
JUDGED, NAMED = 3, 4


def answer(search: Search, wanted: int, offering: bool = True) -> SearchResult:
    """Search what memfit may choose; then, with `offering`, what it may not, as long as that would be faster."""
    allowed = ALLOWED_TIER[search.axes.recipe.allow]
    taken = search.run(Limits(lambda setup, step: _tier(setup, step) <= allowed and not would_of(setup, step), wanted))
    known = any(fit.forecast.speed is not None for fit in taken.fits)
    best = taken.fits[0].seconds if taken.fits and known else float("inf")
    outcomes, offers = [taken], []
    if offering and (known or not taken.fits):
        others = Limits(lambda setup, step: _tier(setup, step) > allowed or bool(would_of(setup, step)), 2, best)
        outcomes.append(search.run(others))
        offers = [_offer(search, fit, best) for fit in outcomes[1].fits]
    ranked = tuple(_plan(search, fit, taken) for fit in taken.fits)
    refused = tuple(_refusals(search, taken))
    return SearchResult(
        chosen=ranked[0] if ranked else None,
        ranked=ranked,
        refused=refused,
        nearest=(),
        searched=taken.searched,
        seconds=taken.seconds,
        offers=tuple(offers),
        capacity_bytes=capacity_bytes(search.axes.hardware),
        timed=_timed(search),
        points=tuple(points_of(search, outcomes, lambda setup, step: "; ".join(_whys(search, setup, step)))),
    )


def levers_of(search: Search, candidate: Candidate) -> dict[str, Any]:
    """What a candidate chooses, by the recipe's dotted keys: the main levers, and what is off its default."""
    setup, step, trim = candidate.setup, candidate.step, candidate.trim
    found: dict[str, Any] = {"levers.parallel": setup.parallel, "levers.precision": setup.precision}
    if setup.offload != "none":
        found["levers.offload"] = setup.offload
        if setup.offload_to != "host":
            found["levers.offload_to"] = setup.offload_to
        if not trim.pin_memory:
            found["levers.pin_memory"] = False
    if setup.optimizer != "adamw":
        found["levers.optimizer"] = setup.optimizer
    found |= {"levers.checkpointing": step.checkpointing, "levers.loss": step.loss}
    if step.activation_offload:
        found["levers.activation_offload"] = True
    found["levers.micro_batch"] = step.micro_batch
    if trim.allocator != "default":
        found["levers.allocator"] = trim.allocator
    section = STRATEGIES[setup.parallel].section
    if setup.overlap:
        found[f"engine.{section}.overlap_comm"] = True
    return found | {f"engine.{section}.{key}": value for key, value in trim.engine}


def levers_text(levers: Mapping[str, Any]) -> str:
    """Levers as a person reads them: the values whose words say what they are, the others with their keys."""
    plain = {"parallel", "precision", "optimizer"}
    texts = []
    for key, value in levers.items():
        name = key.rpartition(".")[2]
        if key.startswith("engine."):
            texts.append(f"{name} {value:.0e}".replace("e+0", "e") if isinstance(value, int) and value > 9 else name)
        elif name in plain:
            texts.append(str(value))
        elif value is True:
            texts.append(name.replace("_", " "))
        else:
            texts.append(f"{name.replace('_', ' ').replace('micro batch', 'micro-batch')} {value}")
    return ", ".join(texts)


def result_json(result: SearchResult) -> dict[str, Any]:
    """The object that `memfit plan --json` prints and plan.json holds."""
    return {
        "chosen": plan_json(result.chosen) if result.chosen else None,
        "ranked": [plan_json(plan) for plan in result.ranked],
        "refused": [dataclasses.asdict(one) for one in result.refused],
        "nearest": [dataclasses.asdict(one) for one in result.nearest],
        "searched": result.searched,
        "seconds": result.seconds,
        "offers": [dataclasses.asdict(one) for one in result.offers],
        "answers": [dataclasses.asdict(one) for one in result.answers],
        **({"sweep_key": result.sweep.key, "sweep": sweep_json(result.sweep)} if result.sweep else {}),
    }


def file_json(result: SearchResult) -> dict[str, Any]:
    """What plan.json holds: the same object, and what became of every combination of levers."""
    return {**result_json(result), "candidates": points_json(result.points, result.timed)}


def search_json(result: SearchResult) -> dict[str, Any]:
    """What a run's plan.json holds beside its plan: what else was searched, and what became of it."""
    kept = ("refused", "offers", "searched", "seconds", "candidates")
    return {name: value for name, value in file_json(result).items() if name in kept}


def _timed(search: Search) -> bool:
    """Whether the catalogue has rates for this hardware."""
    setup, steps = next(iter(search.axes.legal.items()))
    return rates_for(search.tables.counting(setup, steps[0])) is not None


def gives(forecast: Forecast) -> str:
    """What a plan needs and how fast it is, in a few words."""
    texts = []
    reserved = forecast.reserved
    if reserved is not None:
        process = reserved.peak_reserved + sum(size for _, size, _ in reserved.outside)
        texts.append(f"{gib(process)} a GPU")
    if forecast.node is not None:
        texts.append(f"{gib(forecast.node.peak_bytes)} of host memory")
    if forecast.speed is not None:
        texts.append(f"{duration(forecast.speed.step_seconds)} a step")
    return ", ".join(texts)


def _tier(setup: Setup, step: Step) -> int:
    return max(setup.tier, step.tier)


def would_of(setup: Setup, step: Step) -> tuple[str, ...]:
    """Chosen values that no engine of memfit runs today."""
    return (*setup.would, *step.would)


def _whys(search: Search, setup: Setup, step: Step) -> list[str]:
    """Why a combination may not be taken, whatever it needs."""
    allowed, tier = ALLOWED_TIER[search.axes.recipe.allow], _tier(setup, step)
    found = [f"{text} is forecast only" for text in would_of(setup, step)]
    if tier > allowed:
        found.append(f"allow: {search.axes.recipe.allow} leaves out tier {tier}, {TIERS[tier]}")
    return found


def _plan(search: Search, fit: Fit, outcome: Outcome) -> Plan:
    layout = fit.forecast.layout
    assert layout is not None
    recipe = fit.forecast.recipe
    return Plan(recipe, layout, fit.forecast, fit.candidate.tier, tuple(_reasons(search, fit, outcome)))


def _reasons(search: Search, fit: Fit, outcome: Outcome) -> Iterator[str]:
    """Why this one: its tier, its speed, what faster ones lack, what its values are off their defaults for."""
    speed, candidate = fit.forecast.speed, fit.candidate
    first = fit is outcome.fits[0]
    order = "the fastest" if first else f"number {1 + outcome.fits.index(fit)} by speed"
    if speed is None:
        order = f"{order} that fits, in the order of its work (no rates are known here)"
        yield f"{order}; tier {candidate.tier}: {TIERS[candidate.tier]}"
    else:
        yield (
            f"{order} that fits in tier {candidate.tier} ({TIERS[candidate.tier]}): "
            f"{duration(speed.step_seconds)} a step, most of it {speed.bound}"
        )
    if first and candidate.setup.parallel == "none":
        yield from _engines_alone(fit, outcome)
    if candidate.trim.engine and fit.lacks and candidate.trim.pin_memory:
        values = ", ".join(f"{key} {value:,}" for key, value in candidate.trim.engine)
        yield f"{values}: with the engine's defaults {gib(fit.lacks)} are missing"
    if candidate.setup.offload != "none" and not candidate.trim.pin_memory:
        missing = f": with page-locked memory {gib(fit.lacks)} are missing" if fit.lacks else ""
        yield f"pin_memory false{missing}; copies are slower then than the figure says"
    if first:
        yield from _faster(search, fit, outcome)
    if fit.forecast.verdict == "borderline":
        yield "borderline: the figure fits, the upper end of its 90% interval does not"
    gpu = search.axes.hardware.gpu
    if gpu is not None and candidate.setup.parallel != "none":
        yield f"{candidate.setup.parallel} was measured on CPU ranks; no GPU of ours has confirmed it yet"
    room = host_room(fit.forecast)
    if room is None and gpu is not None and candidate.setup.offload != "none":
        yield "how much host memory a node has is not stated (--host-memory), so that it was not judged"


def _engines_alone(fit: Fit, outcome: Outcome) -> Iterator[str]:
    """The engine that the speed model has before a choice without one: see `Search._weighed`."""
    times = {
        other.candidate.setup.parallel: other.forecast.speed.step_seconds
        for other in outcome.fits
        if other.forecast.speed is not None
    }
    name = min(times, key=lambda parallel: times[parallel], default="none")
    if name != "none":
        yield (
            f"{name} on one card would take {duration(times[name])}, within the speed model's error of "
            f"{TYPICAL_ERROR:.0%}: an engine is taken there only where it wins more than that"
        )


def _faster(search: Search, fit: Fit, outcome: Outcome) -> Iterator[str]:
    """What would be faster in the same tier and does not fit: of each set-up what lacks least."""
    faster = [m for m in outcome.misses if m.seconds < fit.seconds and m.candidate.tier <= fit.candidate.tier]
    for miss, _ in best_misses(faster)[:NAMED]:
        words = "at least " if miss.bound else ""
        text = levers_text(levers_of(search, miss.candidate))
        yield f"faster, but {words}{gib(miss.short)} short {PLACES[miss.place]}: {text}"


def _refusals(search: Search, outcome: Outcome) -> Iterator[Refused]:
    """Of every set-up that fits in no way the closest, smallest shortfall first."""
    solved = {_row(fit.candidate.setup) for fit in outcome.fits}
    closest = [(miss, count) for miss, count in best_misses(outcome.misses) if _row(miss.candidate.setup) not in solved]
    complete = [(miss, count) for miss, count in closest if _all_refused(search, miss, count)]
    for at, (miss, count) in enumerate(complete):
        short, place, bound = miss.short, miss.place, miss.bound
        if at < JUDGED and not outcome.fits:
            forecast = search.tracer.forecast(search.recipe(miss.candidate))
            if forecast.fits is False:
                (short, place), bound = shortfall_of(forecast), False
        need = "needs at least" if bound else "needs"
        reason = f"{need} {gib(short)} more {PLACES[place]}"
        trims = len(search.tables.trims[miss.candidate.setup])
        yield Refused(levers_of(search, miss.candidate), reason, short, bound, count * trims)


def _all_refused(search: Search, miss: Miss, count: int) -> bool:
    """Whether every step of a set-up was refused: one that was not looked at may fit."""
    rows = [len(steps) for setup, steps in search.axes.legal.items() if _row(setup) == _row(miss.candidate.setup)]
    return count >= sum(rows)


def _row(setup: Setup) -> tuple[str, ...]:
    return setup.parallel, setup.offload, setup.offload_to, setup.precision, setup.optimizer


def _offer(search: Search, fit: Fit, best: float) -> Offer:
    candidate = fit.candidate
    whys = _whys(search, candidate.setup, candidate.step)
    gain = ""
    if best < float("inf") and fit.forecast.speed:
        gain = f"; {best / fit.seconds:.2f} times as fast" if best > 1.005 * fit.seconds else "; hardly faster"
    return Offer(levers_of(search, candidate), "; ".join(whys), gives(fit.forecast) + gain)
