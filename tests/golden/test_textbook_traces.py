"""The textbook's two rules that need traces: what is written is what is traced, and stands beside what is taught."""

from __future__ import annotations

import json
from typing import Any

import pytest

from memfit.inputs.cache import installed_versions
from tools.physics_docs import (
    CHECKPOINTED,
    OUTGROWN,
    RECORDS,
    STEP,
    activations_and_states,
    checkpointing_table,
    outgrown_table,
    saved,
    trace_checkpointing,
)

WRITTEN: dict[str, Any] = json.loads(RECORDS.read_text(encoding="utf-8"))
TAUGHT = (0.30, 0.50)


def needs_the_written_versions() -> None:
    if WRITTEN["versions"] != dict(installed_versions()):
        pytest.skip(f"written with {WRITTEN['versions']}, here is {dict(installed_versions())}")


def rows(kind: str, **wanted: str) -> list[dict[str, Any]]:
    return [row for row in WRITTEN[kind] if all(row[key] == value for key, value in wanted.items())]


def test_three_real_models() -> None:
    assert {row["model"] for row in WRITTEN["checkpointing"]} == set(CHECKPOINTED)
    assert {(row["model"], row["checkpointing"]) for row in WRITTEN["outgrown"]} == {
        (model, mode) for model in OUTGROWN for mode in ("none", "full")
    }


def test_the_rule_understates_what_is_kept_and_overstates_the_peak() -> None:
    """In a full fine-tune more than half of what is kept is saved, and of the whole peak less than 30%."""
    for row in rows("checkpointing", method="full"):
        assert saved(row["kept"]) > TAUGHT[1], row["model"]
    dense = rows("checkpointing", method="full", model="llama-3.1-8b")[0]
    assert saved(dense["peak"]) < TAUGHT[0]


def test_written_figures_are_traced_figures() -> None:
    needs_the_written_versions()
    assert trace_checkpointing("llama-3.1-8b", "lora") == rows("checkpointing", model="llama-3.1-8b", method="lora")[0]


def test_the_crossing_is_where_it_is_written() -> None:
    """One step of the search before it activations are smaller; there they are larger; the states are the same."""
    needs_the_written_versions()
    row = rows("outgrown", model="llama-3.2-1b", checkpointing="none")[0]
    activations, states = activations_and_states("llama-3.2-1b", "none", row["tokens"])
    before, _ = activations_and_states("llama-3.2-1b", "none", row["tokens"] - STEP)
    assert states == row["states"]
    assert before <= states < activations
    # A planted error of a tenth in either moves the crossing past a step.
    assert not before * 1.1 <= states or not states * 1.1 < activations


def test_checkpointing_moves_the_crossing_out() -> None:
    for model in OUTGROWN:
        none, full = (rows("outgrown", model=model, checkpointing=mode)[0]["tokens"] for mode in ("none", "full"))
        assert none is not None
        assert full is None or full > none


def test_tables() -> None:
    one = {
        "model": "m",
        "method": "full",
        "kept": {"none": 4 << 30, "full": 1 << 30},
        "peak": {"none": 8 << 30, "full": 6 << 30},
    }
    text = checkpointing_table({"checkpointing": [one]})
    assert "| m | full | 4.00 GiB, 1.00 GiB | 75% | 8.00 GiB, 6.00 GiB | 25% | 30 to 50% |" in text
    lengths = [
        {"model": "m", "checkpointing": "none", "tokens": 2048, "states": 1 << 30},
        {"model": "m", "checkpointing": "full", "tokens": None, "states": 1 << 30},
    ]
    assert "| m | 1.00 GiB | 2,048 tokens | - |" in outgrown_table({"outgrown": lengths})
