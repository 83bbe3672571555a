"""Failures planted in a job: the proof names the lever, and the run or its forecast would really have been wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import jobs
from tests.flips import ALONE, SHORT, Flip
from tests.planting import Ran, damage, failed, known, run
from tests.plants import BY_NAME, PLANTS, Plant

Proved = Callable[..., Ran]
# Of one recipe, so that one healthy run stands beside all of them.
QUICK = ("connector frozen", "prompts trained", "no accumulation", "one part's rate otherwise", "vision detached")


@pytest.fixture(scope="module")
def proved(dummies: Callable[[str], Path], slips: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ran]:
    """`proved(sets, plant, follow, save, other)`: the proof of a job with a failure in it. Healthy ones are kept."""
    healthy: dict[object, Ran] = {}

    def prove(
        sets: tuple[str, ...],
        plant: str | None = None,
        follow: bool = False,
        save: bool = False,
        other: tuple[str, ...] | None = None,
    ) -> Ran:
        key = (sets, follow, save)
        if plant is None and other is None and key in healthy:
            return healthy[key]
        made = []
        for each in (sets, other):
            words = jobs.settings("none", each or (), slips)
            folder = jobs.write_job(tmp_path_factory.mktemp("jobs") / "run", dummies("minicpmv4_6"), words)
            made.append(jobs.read_job(folder, follow))
            if other is None:
                break
        try:
            found = run(made[0], plant, follow, save, made[1] if other is not None else None)
        finally:
            jobs.forget()
        if plant is None and other is None:
            healthy[key] = found
        return found

    return prove


def check(plant: Plant, proved: Proved) -> None:
    """Assert that a planted failure is caught by its lever, that the healthy run is not, and that it does damage."""
    follow, save = plant.shown == "bytes", plant.shown == "saved"
    right, wrong = proved(plant.sets, None, follow, save), proved(plant.sets, plant.name, follow, save)
    assert not failed(right)
    assert plant.lever in failed(wrong), f"{plant.name} is not caught: {failed(wrong)}"
    assert wrong.proof is not None
    assert all(check.fix for check in wrong.proof.failed if check.lever == plant.lever)
    assert damage(plant.shown, right, wrong), f"{plant.name} does nothing"


def alone(quick: bool) -> list[str]:
    return [plant.name for plant in PLANTS if plant.layout == "none" and (plant.name in QUICK) == quick]


def test_every_failure_of_the_table_can_be_planted() -> None:
    assert {plant.name for plant in PLANTS} == known()
    assert len(BY_NAME) == len(PLANTS) >= 25
    assert set(QUICK) <= set(BY_NAME)


@pytest.mark.parametrize("name", alone(quick=True))
def test_a_planted_failure_is_caught(name: str, proved: Proved) -> None:
    check(BY_NAME[name], proved)


@pytest.mark.long
@pytest.mark.parametrize("name", alone(quick=False))
def test_every_planted_failure_is_caught(name: str, proved: Proved) -> None:
    check(BY_NAME[name], proved)


def flipped(flip: Flip, proved: Proved) -> None:
    """Assert that a lever which is other than planned does not pass."""
    assert failed(proved(flip.planned, other=flip.runs)), f"{flip.name} is not caught"


@pytest.mark.parametrize("flip", SHORT, ids=lambda flip: flip.name)
def test_a_lever_other_than_planned_is_caught(flip: Flip, proved: Proved) -> None:
    flipped(flip, proved)


@pytest.mark.long
@pytest.mark.parametrize("flip", ALONE, ids=lambda flip: flip.name)
def test_any_lever_other_than_planned_is_caught(flip: Flip, proved: Proved) -> None:
    flipped(flip, proved)
