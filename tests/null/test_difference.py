"""Two runs, term by term: the difference of sums is the sum of differences, and nothing is lost between them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from memfit.catalog.gpus import parse_hardware
from memfit.planner.activations import with_trace
from memfit.planner.difference import difference
from memfit.planner.difference_text import difference_text, signed
from memfit.planner.estimate import estimate_states
from memfit.specs.ledger import PHASES
from memfit.specs.plan import Forecast, Reserved
from memfit.specs.recipe import Levers, Lora, Recipe
from memfit.specs.trace import Moment, PeakRow, StepTrace
from memfit.units import GIB, MIB
from tests.null.hand_model import FAMILY, NUMEL, profile

REPLAYED = Reserved(3 * GIB, 3 * GIB + MIB, 4 * GIB, (("context", 400 * MIB, "cited"),), "a replay")


def step_trace(saved: int, transient: int) -> StepTrace:
    """A step as a trace would give it: its figures are made up, its shape is not."""
    rows = tuple(
        PeakRow(phase, 100 + saved + transient, 100, saved, transient, 0, "language", 0, "aten.mm")
        for phase in ("forward", "loss", "backward")
    )
    timeline = tuple(
        Moment(10 * place + at, phase, 100, saved * at // 9, transient, 0)
        for place, phase in enumerate(("forward", "loss", "backward"))
        for at in range(10)
    )
    return StepTrace("gpu", (), 100, 0, {}, (), rows, rows, (), (), timeline=timeline)


def run(saved: int | None = GIB, transient: int = 2 * GIB, gpus: str = "1xRTX4090", **keys: Any) -> Forecast:
    forecast = estimate_states(Recipe(model="m", **keys), profile(), FAMILY, parse_hardware(gpus))
    return forecast if saved is None else with_trace(forecast, step_trace(saved, transient), REPLAYED)


def test_a_run_and_itself() -> None:
    same = difference(run(), run())
    assert same.changed == ()
    assert same.keys == ()
    assert {row.id for row in same.equal} == {term.id for term in run().ledger.terms}
    assert "every term is the same" in difference_text(same)


def test_by_hand() -> None:
    """pure-bf16 halves weights, gradients and moments; the trace keeps half a GiB less."""
    found = difference(run(), run(saved=GIB // 2, levers=Levers(precision="pure-bf16")))
    changes = {row.id: row.change for row in found.changed}
    assert changes["weights.vision"] == -2 * NUMEL["vision"]
    assert changes["optimizer.language"] == -4 * NUMEL["language"]
    assert changes["activations.loss"] == -GIB // 2
    assert "transient.loss" not in changes
    assert {row.key for row in found.keys} == {"levers.precision", "levers.autocast"}
    # Largest change first.
    assert [abs(row.change) for row in found.changed] == sorted(
        (abs(row.change) for row in found.changed), reverse=True
    )


def test_only_in_one() -> None:
    found = difference(run(), run(method="lora", lora=Lora(rank=2)))
    kinds = {row.id: (row.first is None, row.second is None) for row in found.changed}
    assert kinds["adapter.weights.language"] == (True, False)
    assert kinds["gradients.vision"] == (False, True)
    text = difference_text(found)
    assert "only A" in text
    assert "only B" in text


def test_terms_add_up_to_the_change_of_each_phase() -> None:
    first, second = run(), run(method="lora", saved=GIB // 3)
    found = difference(first, second)
    for phase in ("load", "forward", "loss", "backward", "step"):
        gpu = [row for row in (*found.changed, *found.equal) if row.place == "gpu"]
        one = {term.id for term in first.ledger.at("gpu") if phase in term.alive}
        two = {term.id for term in second.ledger.at("gpu") if phase in term.alive}
        change = sum((row.second or 0) * (row.id in two) - (row.first or 0) * (row.id in one) for row in gpu)
        assert change == found.phase_change(phase), phase


def test_a_planted_error_is_seen() -> None:
    first = run()
    terms = list(first.ledger.terms)
    place = next(index for index, term in enumerate(terms) if term.id == "activations.backward")
    terms[place] = dataclasses.replace(terms[place], bytes=terms[place].bytes * 11 // 10)
    wrong = dataclasses.replace(first, ledger=dataclasses.replace(first.ledger, terms=tuple(terms)))
    assert [row.id for row in difference(first, wrong).changed] == ["activations.backward"]


def test_phases_without_a_figure_are_null() -> None:
    found = difference(run(saved=None), run())
    assert found.first.verdict == "unknown"
    assert found.first.allocated is None
    assert all(found.phase_change(phase) is None for phase in PHASES)
    assert "terms alive in" in difference_text(found)
    assert "not forecast yet for A:" in difference_text(found)


def test_another_lifetime_is_a_change() -> None:
    """With accumulation gradients stay through the forward: the same bytes, in other phases."""
    found = difference(run(saved=None, batch=1), run(saved=None, batch=4))
    rows = {row.id: row for row in found.changed}
    assert rows["gradients.language"].change == 0
    assert "other phases" in difference_text(found)


def test_json() -> None:
    found = difference(run(), run(method="lora"), ("one", "two"))
    data = json.loads(json.dumps(found.to_json()))
    assert data["first"]["name"] == "one"
    assert data["second"]["process"] == 4 * GIB + 400 * MIB
    assert data["equal"]["bytes"] == sum(row["first"] for row in data["equal"]["terms"])
    assert data["phases"]["evaluate"] is None
    assert data["phases"]["loss"] == found.phase_change("loss")
    assert {row["key"] for row in data["recipe"]} >= {"method"}


def test_signs() -> None:
    assert [signed(size) for size in (GIB, -GIB, 0, None)] == ["+1.00 GiB", "-1.00 GiB", "0", "-"]
