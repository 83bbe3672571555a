"""Adapters beside 4-bit weights: two ranks, each with its own packed copy, learn what one process learns."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from memfit.testing import make_dummy, make_samples
from tests.invariant.test_trajectories import COMMON, LAYOUTS, TWO
from tests.invariant.trajectories import Case, Common, follows, run_alone, run_in_ranks


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_two_ranks_learn_what_one_learns_beside_packed_weights(tmp_path: Path) -> None:
    data = make_samples(tmp_path / "samples", 13)
    recipe = Common(make_dummy("qwen2_5_vl", tmp_path / "model"), data, (*COMMON, "method=qlora", "schedule.steps=4"))
    alone = run_alone(recipe, Case("none", ("hardware.gpus=1xcpu",)), tmp_path / "one")
    (found,) = run_in_ranks([(recipe, [Case("ddp", (TWO, *LAYOUTS["ddp"]))])], tmp_path / "two", 2)
    follows("qwen2_5_vl, qlora", "ddp", alone, found["ddp"])
