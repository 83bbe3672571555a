"""`memfit plan`: search, write plan.json, draw, print; or answer "why not?" from a plan.json that is there."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memfit import api
from memfit.inputs.plan_file import is_plan_file, may_write_plan
from memfit.inputs.run_folder import write_json
from memfit.inputs.terminal import width_of
from memfit.monitor.picture_file import check_picture
from memfit.planner.answer import file_json, result_json
from memfit.planner.plan_text import answer_lines, plan_text
from memfit.specs.search import Answer, SearchResult


@dataclass(frozen=True)
class PlanRequest:
    """What the command line asked for; see its options."""

    recipe: Path | None
    sets: tuple[str, ...]
    model: str | None
    out: Path
    sweep: str | None
    plot: Path | None
    why_not: tuple[str, ...]
    brief: bool
    as_json: bool


def run_plan(request: PlanRequest, say: Callable[[str], None]) -> int:
    """The exit code: 0, or 3 where nothing fits."""
    if request.why_not and request.recipe is not None and is_plan_file(request.recipe):
        _tell(request, api.why_not(request.recipe, request.why_not))
        return 0
    may_write_plan(request.out)
    if request.plot is not None:
        check_picture(request.plot)  # before a search that may take minutes
    wanted: dict[str, Any] = {"sets": request.sets, "model": request.model, "say": say}
    asked = not (request.brief or request.why_not)
    found = api.plan(request.recipe, **wanted, sweep=request.sweep, questions=asked and request.as_json)
    write_json(request.out, file_json(found))
    if request.plot is not None:
        name = request.recipe.stem if request.recipe is not None else request.model or "plan"
        say(f"picture: {api.plot_plan(found, request.plot, name)}")
    if request.why_not:
        _tell(request, api.why_not(request.out, request.why_not))
    elif request.as_json:
        print(json.dumps(result_json(found), indent=2, ensure_ascii=False))
    else:
        width = width_of(sys.stdout)
        print(plan_text(found, width), flush=True)
        say(f"written: {request.out}" + (f"; memfit train {request.out} runs it" if found.chosen else ""))
        if asked:
            _answer(request, found, wanted)
    return 0 if found.chosen is not None else 3


def _answer(request: PlanRequest, found: SearchResult, wanted: dict[str, Any]) -> None:
    """Answer what people ask of every plan as each answer is there: it may take traces that the plan did not."""
    width, answers = width_of(sys.stdout), list[Answer]()
    for one in api.plan_answers(found, request.recipe, **wanted):
        print("\n".join(([""] if not answers else []) + answer_lines(one, width)), flush=True)
        answers.append(one)
    write_json(request.out, file_json(dataclasses.replace(found, answers=tuple(answers))))


def _tell(request: PlanRequest, lines: list[str]) -> None:
    print(json.dumps({"why_not": lines}, indent=2, ensure_ascii=False) if request.as_json else "\n".join(lines))
