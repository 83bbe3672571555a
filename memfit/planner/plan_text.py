"""The answer of `memfit plan` for people: verdict, table, reasons, what was refused and what would help."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from memfit.planner.answer import levers_text
from memfit.planner.estimate_text import aligned
from memfit.planner.sweep_text import sweep_text
from memfit.planner.verdict import gpu_room, host_room
from memfit.specs.plan import Forecast, Plan
from memfit.specs.recipe import Recipe
from memfit.specs.search import Answer, Refused, SearchResult
from memfit.units import duration, gib

SHOWN_REFUSALS = 8


def plan_text(result: SearchResult, width: int | None = None) -> str:
    """The whole answer; `width`: columns of the reader's terminal, None where lines may be of any length."""
    lines = [_verdict(result), ""]
    table: list[str] = []
    if result.ranked:
        table = _table(result.ranked, result.samples, width)
        lines += [*table, "", "why:", *(f"  {reason}" for reason in result.ranked[0].reasons)]
    lines += _refused(result)
    if result.offers:
        lines += ["", "not taken:"]
        lines += [f"  {levers_text(one.levers)}: {one.gives} ({one.why})" for one in result.offers]
    if result.nearest:
        lines += ["", "what would make it fit:", *(f"  {one.change}: {one.gives}" for one in result.nearest)]
    if result.answers:
        lines += ["", *(line for one in result.answers for line in answer_lines(one, None))]
    if width is not None:
        lines = [piece for line in lines for piece in ([line] if line in table else _wrapped(line, width))]
    if result.sweep:
        lines += ["", sweep_text(result.sweep, width or 100)]
    return "\n".join(lines)


def answer_lines(one: Answer, width: int | None) -> list[str]:
    """A question with its answer."""
    text = f"{one.question} {one.answer}"
    return [text] if width is None else _wrapped(text, width)


def _wrapped(line: str, width: int) -> list[str]:
    """A line in lines no longer than the terminal, the later ones further in."""
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(line, width, subsequent_indent=f"{indent}    ", break_on_hyphens=False) or [""]


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
    return f"{forecast.verdict}: {levers_line(plan.recipe)}{needs}{speed} on {forecast.hardware.text}; {tail}"


def _table(plans: Sequence[Plan], samples: int | None, width: int | None) -> list[str]:
    """Figures of each plan beside its levers, or below them where the terminal is too narrow for both."""
    rows = [["", "levers", "GPU", "margin", "host", "a step", "the run", "tier"]]
    for number, plan in enumerate(plans, 1):
        forecast = plan.forecast
        gpu, speed = gpu_room(forecast), forecast.speed
        steps = _steps(plan.recipe, samples)
        rows.append(
            [
                str(number),
                levers_line(plan.recipe),
                gib(gpu.needed) if gpu else "-",
                gib(gpu.capacity - gpu.needed) if gpu else "-",
                gib(forecast.node.peak_bytes) if forecast.node else "-",
                duration(speed.step_seconds) if speed else "-",
                duration(steps * speed.step_seconds) if speed and steps else "-",
                f"{plan.tier}{' borderline' if forecast.verdict == 'borderline' else ''}",
            ]
        )
    found = aligned(rows, total=False)
    if width is None or len(found[1]) <= width:
        return found
    figures = aligned([["", "", *row[2:]] for row in rows], total=False)
    lines = figures[:2]
    for row, line in zip(rows[1:], figures[2:], strict=True):
        lines += [*_wrapped(f"{row[0]:<3}{row[1]}", width), line]
    return lines


def levers_line(recipe: Recipe) -> str:
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
    return levers_line(forecast.recipe)
