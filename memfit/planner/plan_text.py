"""The answer of `memfit plan` for people: verdict, table, reasons, what was refused and what would help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memfit.planner.answer import levers_text
from memfit.planner.estimate_text import aligned
from memfit.planner.verdict import gpu_room, host_room
from memfit.specs.plan import Forecast, Plan
from memfit.specs.recipe import Recipe
from memfit.specs.search import Refused, SearchResult
from memfit.units import duration, gib

SHOWN_REFUSALS = 8


def plan_text(result: SearchResult) -> str:
    """The whole answer."""
    lines = [_verdict(result), ""]
    if result.ranked:
        lines += [*_table(result.ranked, result.samples), "", "why:"]
        lines += [f"  {reason}" for reason in result.ranked[0].reasons]
    lines += _refused(result)
    if result.offers:
        lines += ["", "not taken:"]
        lines += [f"  {levers_text(one.levers)}: {one.gives} ({one.why})" for one in result.offers]
    if result.nearest:
        lines += ["", "what would make it fit:", *(f"  {one.change}: {one.gives}" for one in result.nearest)]
    return "\n".join(lines)


def _verdict(result: SearchResult) -> str:
    tail = f"{result.searched:,} candidates in {duration(result.seconds)}"
    if result.chosen is None:
        least = result.refused[0] if result.refused else None
        short = f": the closest {least.reason}" if least else ""
        return f"does not fit{short}; {tail}"
    plan = result.chosen
    forecast = plan.forecast
    room = gpu_room(forecast) or host_room(forecast)
    needs = f", {gib(room.needed)} of {gib(room.capacity)}" if room else ""
    speed = f", {duration(forecast.speed.step_seconds)} a step" if forecast.speed else ""
    return f"{forecast.verdict}: {_levers(plan.recipe)}{needs}{speed} on {forecast.hardware.text}; {tail}"


def _table(plans: Sequence[Plan], samples: int | None) -> list[str]:
    rows = [["", "levers", "GPU", "margin", "host", "a step", "the run", "tier"]]
    for number, plan in enumerate(plans, 1):
        forecast = plan.forecast
        gpu, speed = gpu_room(forecast), forecast.speed
        steps = _steps(plan.recipe, samples)
        rows.append(
            [
                str(number),
                _levers(plan.recipe),
                gib(gpu.needed) if gpu else "-",
                gib(gpu.capacity - gpu.needed) if gpu else "-",
                gib(forecast.node.peak_bytes) if forecast.node else "-",
                duration(speed.step_seconds) if speed else "-",
                duration(steps * speed.step_seconds) if speed and steps else "-",
                f"{plan.tier}{' borderline' if forecast.verdict == 'borderline' else ''}",
            ]
        )
    return aligned(rows, total=False)


def _levers(recipe: Recipe) -> str:
    """The levers of a plan in one line."""
    levers = recipe.levers
    texts = [recipe.method, levers.parallel, str(levers.precision)]
    texts += [levers.optimizer] if levers.optimizer != "adamw" else []
    if levers.offload != "none":
        texts += [f"offload {levers.offload}" + ("" if levers.pin_memory is True else " (not page-locked)")]
    texts += [f"checkpointing {levers.checkpointing}"]
    texts += [f"loss {levers.loss}"] if levers.loss != "full-logits" else []
    texts += ["activation offload"] if levers.activation_offload is True else []
    texts += [f"micro-batch {levers.micro_batch}"]
    return ", ".join(texts)


def _steps(recipe: Recipe, samples: int | None) -> int | None:
    if recipe.schedule.steps is not None:
        return recipe.schedule.steps
    return None if samples is None else max(1, round(recipe.schedule.epochs * samples / int(recipe.batch)))


def _refused(result: SearchResult) -> Iterator[str]:
    if not result.refused:
        return
    yield ""
    yield f"refused ({len(result.refused)} set-ups, the closest of each):"
    for one in result.refused[:SHOWN_REFUSALS]:
        yield f"  {one.reason}: {_refused_text(one)}"
    if len(result.refused) > SHOWN_REFUSALS:
        rest = result.refused[SHOWN_REFUSALS:]
        yield f"  {len(rest)} more need {gib(rest[0].short_by_bytes)} to {gib(rest[-1].short_by_bytes)} more"


def _refused_text(one: Refused) -> str:
    """Of what states alone refuse the set-up: no other lever helps it."""
    if not one.at_least:
        return levers_text(one.levers)
    states = {"parallel", "precision", "offload", "offload_to", "optimizer"}
    return levers_text({key: value for key, value in one.levers.items() if key.rpartition(".")[2] in states})


def summary(forecast: Forecast) -> str:
    """One plan in a line, for what would fit."""
    return _levers(forecast.recipe)
