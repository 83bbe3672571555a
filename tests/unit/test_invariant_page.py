"""The page of the layouts' trajectories keeps the last result of each test and the worst of each comparison."""

from __future__ import annotations

from tests.invariant.matrix import joined, page
from tests.invariant.trajectories import Gaps

NOTHING = {"tests": {}, "gaps": {}, "versions": ""}


def test_later_results_replace_earlier_ones() -> None:
    first = [Gaps("a", "ddp", 1e-7, 2e-7, 3e-7), Gaps("a", "ddp", 5e-8, 9e-7, 1e-7), Gaps("a", "fsdp", 0.0, 0.0, 0.0)]
    kept = joined(NOTHING, first, {"test_x": ("failed", 61.0), "test_y": ("skipped", 0.0)}, "2026-11-22")
    assert kept["gaps"]["a"]["ddp"] == {"loss": 1e-7, "gradient": 9e-7, "weight": 3e-7}
    again = joined(kept, [Gaps("a", "ddp", 4e-8, 4e-8, 4e-8)], {"test_x": ("passed", 59.0)}, "2026-11-23")
    assert again["gaps"]["a"] == {"ddp": dict.fromkeys(("loss", "gradient", "weight"), 4e-8), "fsdp": {**NEVER}}
    text = page(again)
    assert "| a | ddp | 4.0e-08 | 4.0e-08 | 4.0e-08 |" in text
    assert "| test_x | passed | 59 | 2026-11-23 |" in text
    assert "| test_y | skipped | 0 | 2026-11-22 |" in text
    assert "2 tests, 1 minutes one after another: 1 passed, 0 failed, 1 skipped." in text


NEVER = dict.fromkeys(("loss", "gradient", "weight"), 0.0)
