"""docs/openbmb-table.md: drawn from its record, whose rows are what OpenBMB's own files say, term by term."""

from __future__ import annotations

import json
from typing import Any

import pytest

from memfit.inputs.recipe_file import load_recipe
from tools import openbmb_docs as docs


@pytest.fixture
def record() -> dict[str, Any]:
    return json.loads(docs.RECORD.read_text(encoding="utf-8"))


def test_the_page_is_as_its_record_says(record: dict[str, Any]) -> None:
    assert docs.main(["--check"]) == 0, "run python tools/openbmb_docs.py"
    record["rows"][0]["process"] += 1 << 30
    assert docs.page(record) != docs.PAGE.read_text(encoding="utf-8")


def test_the_record_holds_every_row_with_the_settings_of_today(record: dict[str, Any]) -> None:
    found = {(row["method"], row["step"], row["gpus"]): row for row in record["rows"]}
    assert len(found) == len(record["rows"])
    for method, step, eager, sets in docs.wanted():
        for gpus in docs.GPUS:
            row = found.pop((method, step, gpus))
            assert row["sets"] == [*docs.COMMON, *docs.OWN[method], *sets, f"hardware.gpus={gpus}xA100-80G"]
            assert row["eager_tower"] == eager
            assert set(row["missing"]) <= {"speed"}
            load_recipe(None, row["sets"], model=docs.MODEL)  # every key and value is one of today's
    assert not found


def test_terms_at_the_peak_sum_to_the_process(record: dict[str, Any]) -> None:
    for row in record["rows"]:
        assert sum(row["at_the_peak"].values()) == row["process"], row["step"]
        assert row["allocated"] <= row["reserved"] <= row["process"]


def test_each_step_changes_what_it_says(record: dict[str, Any]) -> None:
    rows = docs.Rows(record)
    steps = list(docs.LADDER)
    offload, copies, zero2, two = steps[3:]
    for method in docs.METHODS:
        # States of the GPU: next to none on the CPU; whole weights under ZeRO-2.
        before, after = rows.row(method, docs.EAGER, 2)["at_the_peak"], rows.row(method, offload, 2)["at_the_peak"]
        assert after["weights"] - before.get("weights", 0) > 7 << 30
        assert rows.row(method, zero2, 8)["at_the_peak"]["weights"] > 15 << 30
        assert rows.size(method, two, 2) > rows.size(method, zero2, 2)
        assert rows.size(method, docs.EAGER, 2, "tower_for_a_moment") > 3 * rows.size(
            method, steps[1], 2, "tower_for_a_moment"
        )
    # Whole copies of two more parts, frozen originals beside them: their 16-bit weights, split over 2 GPUs.
    grown = (
        rows.row("lora", copies, 2)["at_the_peak"]["weights"] - rows.row("lora", offload, 2)["at_the_peak"]["weights"]
    )
    assert grown == pytest.approx((docs.SAVED["resampler"] + docs.SAVED["tower"]) * 2 / 2, rel=0.05)
    trained = rows.row("lora", copies, 2)["trained"]
    assert trained - sum(docs.SAVED.values()) == 54_525_952  # rank 64 on q, k, v, o of 32 layers


def test_bytes_of_scores_by_hand() -> None:
    """One crop: 16 heads x 1024 x 1024 scores of 14 bytes."""
    assert docs.eager_vision_bytes(1) == 16 * 1024 * 1024 * 14
    assert docs.eager_vision_bytes(10) == 2_348_810_240
