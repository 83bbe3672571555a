"""What the search calls runnable is what `memfit train` runs, value by value: two lists that must not drift apart."""

from __future__ import annotations

import pytest

from memfit.build.supported import refuse_what_is_not_built
from memfit.catalog.gpus import parse_hardware
from memfit.catalog.optimizers import OPTIMIZERS
from memfit.errors import UserError
from memfit.planner.axes import Axes, Trim, axes_of, trims, with_choice
from memfit.specs.recipe import Levers, Recipe
from tests.null.hand_model import profile

PROFILE = profile()


def axes(gpus: str, levers: Levers | None = None) -> Axes:
    recipe = Recipe(model="m", batch=2, allow="learning", levers=levers or Levers())
    return axes_of(recipe, parse_hardware(gpus), PROFILE)


def refusal(recipe: Recipe) -> str:
    try:
        refuse_what_is_not_built(recipe)
    except UserError as error:
        return error.problem
    return ""


def disagreements(found: Axes, deaf: bool = False) -> list[str]:
    """Candidates that one side takes and the other does not; `deaf`: as if the search marked nothing."""
    wrong = []
    for setup, steps in found.legal.items():
        for step in steps:
            would = () if deaf else (*setup.would, *step.would)
            said = refusal(with_choice(found, setup, step, Trim()))
            if bool(would) != bool(said):
                wrong.append(f"{setup} {step}: search says {would or 'runs'}, build says {said or 'runs'}")
    return wrong


@pytest.mark.parametrize("gpus", ["1xRTX4090", "2xRTX4090", "1xV100-32G", "2xT4", "1xcpu", "2xcpu"])
def test_runnable_is_what_build_does_not_refuse(gpus: str) -> None:
    found = axes(gpus)
    assert found.legal
    assert not disagreements(found)


def test_a_search_that_marks_nothing_is_seen() -> None:
    assert disagreements(axes("2xRTX4090"), deaf=True)


def test_every_value_without_a_price_runs_too() -> None:
    """Page-locked or not, each way to map memory, each value of the engine."""
    found = axes("2xRTX4090", Levers(checkpointing="full", loss="chunked", micro_batch=1, activation_offload=False))
    for setup, steps in found.legal.items():
        if setup.would:
            continue
        for trim in trims(found, setup):
            assert not refusal(with_choice(found, setup, steps[0], trim)), (setup, trim)


def test_every_optimizer_that_runs_is_searched() -> None:
    """The other way round: nothing that trains is out of the search's reach. foreach is never less than fused."""
    searched = {
        setup.optimizer for setup in axes("1xRTX4090").legal if not setup.would or "without" in str(setup.would)
    }
    assert searched == {name for name, row in OPTIMIZERS.items() if row.runs_today} - {"adamw-foreach"}
