"""Catalogued models against what transformers builds from their configs, and the shipped numbers against fresh ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import memfit.inputs.cache as cache
import memfit.inputs.tape_store as tape_store
import memfit.inputs.trace_cache as trace_cache
from memfit import api
from memfit.catalog.models import MODELS, ModelRow
from memfit.families import family_for
from memfit.inputs.cache import installed_versions, profile_key
from memfit.inputs.shipped import shipped
from memfit.specs.profile import Profile
from memfit.trace import forecast
from memfit.trace.parameters import read_profile

VERSIONS = Path(cache.__file__).parents[1] / "catalog" / "data" / "versions.json"


def needs_the_shipped_versions() -> None:
    """Shipped numbers are found only by the versions that made them; others trace for themselves."""
    made = json.loads(VERSIONS.read_text(encoding="utf-8"))
    if made != dict(installed_versions()):
        pytest.skip(f"the shipped numbers are of {made}, here is {dict(installed_versions())}")


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_the_count_is_the_published_one(row: ModelRow) -> None:
    counts = read_profile(row.config, family_for(row.config)).part_numel()
    total = sum(counts.values())
    if row.parameters % 1_000_000:
        assert total == row.parameters
    elif row.on_disk:  # published to three digits
        assert total + row.on_disk == pytest.approx(row.parameters, rel=1e-4)
    else:
        assert round(total, -8) == row.parameters
    assert family_for(row.config).name.startswith(row.family)


@pytest.mark.parametrize("name", ["minicpm-v-4.6", "llama-3.2-1b"])
def test_shipped_parameters_are_those_of_a_fresh_build(name: str) -> None:
    needs_the_shipped_versions()
    row = next(row for row in MODELS if row.name == name)
    family = family_for(row.config)
    value = shipped("profiles", profile_key(row.config, family.name))
    assert value is not None, "run python tools/catalog_data.py"
    assert Profile.from_json(value) == read_profile(row.config, family)


def test_a_shipped_step_is_that_of_a_fresh_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_the_shipped_versions()
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path / "one"))
    sets = ["method=lora", "hardware.gpus=1xH100"]
    kept = api.estimate(model="llama-3.2-1b", sets=sets)
    assert kept.trace is not None
    assert kept.trace.seconds == 0, "not shipped: run python tools/catalog_data.py"
    monkeypatch.setattr(trace_cache, "shipped", lambda kind, key: None)
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path / "two"))
    fresh = api.estimate(model="llama-3.2-1b", sets=sets)
    assert fresh.trace is not None
    assert fresh.ledger == kept.ledger, "what is shipped is old: run python tools/catalog_data.py"
    assert fresh.trace.timeline == kept.trace.timeline


def test_a_shipped_tape_is_that_of_fresh_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At rows, a length and a card that nothing was made for."""
    needs_the_shipped_versions()
    sets = ["method=lora", "hardware.gpus=2xL40S", "workload.tokens=1777", "levers.micro_batch=2"]
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path / "one"))
    monkeypatch.setattr(forecast, "_run", lambda request: pytest.fail("run python tools/catalog_tapes.py"))
    played = api.estimate(model="llama-3.2-1b", sets=sets)
    monkeypatch.undo()
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path / "two"))
    monkeypatch.setattr(tape_store, "shipped", lambda kind, key: None)
    fresh = api.estimate(model="llama-3.2-1b", sets=sets)
    assert fresh.ledger == played.ledger, "a tape is old: run python tools/catalog_tapes.py"


def test_other_versions_find_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of another torch are traced anew, not passed off as this one's."""
    row = next(row for row in MODELS if row.name == "llama-3.2-1b")
    monkeypatch.setattr(cache, "installed_versions", lambda: (("torch", "1.0"), ("transformers", "1.0")))
    assert shipped("profiles", profile_key(row.config, "text")) is None
