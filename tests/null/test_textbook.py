"""The textbook's helpers on numbers small enough for a person, and the written table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from memfit.physics.textbook import CLAIMS, image_bytes, mixed, training_states, zero_saving, zero_split

ROOT = Path(__file__).parents[2]


def test_states_of_ten_parameters() -> None:
    plain = training_states(10, "float32").bytes()
    assert (plain["weights"], plain["gradients"], plain["master"], plain["optimizer"]) == (40, 40, 0, 80)
    pure = training_states(10, "bfloat16").bytes()
    assert (pure["weights"], pure["gradients"], pure["master"], pure["optimizer"]) == (20, 20, 0, 40)
    both = mixed(10)
    assert (both["weights"], both["gradients"], both["master"], both["optimizer"]) == (20, 20, 40, 80)
    # 3 ranks: the larger share of 10 is 4
    third = mixed(10, zero_split(2, 3))
    assert (third["weights"], third["gradients"], third["master"], third["optimizer"]) == (20, 8, 16, 32)


@pytest.mark.parametrize(("stage", "split"), [(0, (1, 1, 1)), (1, (1, 1, 8)), (2, (1, 8, 8)), (3, (8, 8, 8))])
def test_what_each_stage_divides(stage: int, split: tuple[int, int, int]) -> None:
    assert zero_split(stage, 8) == split


def test_zero_saves_nothing_on_one_rank_and_grows_with_ranks() -> None:
    for stage in (1, 2, 3):
        assert zero_saving(stage, 1) == 1
        savings = [zero_saving(stage, ranks) for ranks in (1, 2, 8, 64)]
        assert savings == sorted(savings)
    assert zero_saving(1, 4, parameters=400) == 16 / (2 + 2 + 3)


def test_pictures() -> None:
    assert image_bytes((2, 3, 4)) == 24
    assert image_bytes((2, 3, 4), "float32", batch=5) == 480


def test_claims_are_complete() -> None:
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.taught, claim.id
        assert claim.formula, claim.id
        assert claim.leaves_out, claim.id
        assert claim.value() > 0, claim.id


def test_the_page_shows_what_is_computed() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "physics_docs.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
