"""Questions of the field as shipped recipes: ranges for the answers, by arithmetic that is not memfit's."""

from __future__ import annotations

from pathlib import Path

import pytest

import memfit
from memfit.planner.verdict import gpu_room, host_room
from memfit.specs.plan import Forecast
from memfit.units import GIB

RECIPES = Path(__file__).parents[2] / "recipes"
TWO_3090 = RECIPES / "minicpm-o-2_6-2x3090.yaml"
CANNOT = RECIPES / "minicpm-v-2_6-full-1x4090.yaml"
STATES = {"weights", "gradients", "master", "optimizer"}


def estimated(precision: str, offload: str) -> Forecast:
    """Question 2: two RTX 3090, ZeRO-3, 1,024 tokens, one slice, vision frozen."""
    sets = ["levers.parallel=zero3", f"levers.precision={precision}", f"levers.offload={offload}"]
    return memfit.estimate(TWO_3090, sets=sets)


def host_states(forecast: Forecast) -> float:
    """GiB of a node's states of what learns, page-locked rounding left out; engine's partitions included."""
    terms = [term for term in forecast.ledger.at("host") if set(term.id.split(".")) & STATES]
    return sum(term.bytes for term in terms) / GIB


def test_with_offload_in_effect_two_3090_hold_it() -> None:
    """7.63 B parameters learn: 20 bytes each (bf16 weight and gradient, and of fp32 gradient, master and two moments)
    are 142 GiB of host memory; frozen vision weights add 1."""
    found = estimated("bf16-mixed", "params+optimizer")
    room = gpu_room(found)
    assert room is not None
    assert room.needed < 14 * GIB
    assert host_states(found) == pytest.approx(144, rel=0.03)
    assert found.verdict == "fits"


def test_pure_bf16_needs_about_half_of_the_host() -> None:
    """At 10 bytes 71 GiB; DeepSpeed's gradient partitions beside the gradients that are stepped make it 12, 85 GiB."""
    assert 71 < host_states(estimated("pure-bf16", "params+optimizer")) < 87


def test_without_offload_no_3090_holds_it() -> None:
    """The failure of the thread: ZeRO-3 whose file says offload none."""
    for precision in ("bf16-mixed", "pure-bf16"):
        found = estimated(precision, "none")
        room = gpu_room(found)
        assert room is not None
        assert room.needed > 24 * GIB
        assert found.fits is False


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_host_memory_decides_what_is_chosen() -> None:
    chosen = {}
    for size in (64, 128, 256):
        plan = memfit.plan(TWO_3090, sets=[f"hardware.host_memory={size}GiB"]).chosen
        assert plan is not None
        room = host_room(plan.forecast)
        assert room is not None
        assert room.short == 0
        levers = plan.recipe.levers
        chosen[size] = (levers.parallel, levers.offload, levers.precision)
        assert levers.offload != "none"
    assert len(set(chosen.values())) == 3
    assert chosen[64][2] == "pure-bf16", "fp32 master weights alone need more"
    assert chosen[256][2] != "pure-bf16", "tier 1 fits, so rounding is not touched"


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_what_cannot_fit_is_told_to_the_byte() -> None:
    found = memfit.plan(CANNOT)
    assert found.chosen is None
    closest = found.refused[0]
    assert not closest.at_least
    alone = memfit.estimate(CANNOT, sets=[f"{key}={value}" for key, value in closest.levers.items()])
    room = gpu_room(alone)
    assert room is not None
    assert room.short == closest.short_by_bytes
    # 8.1 B parameters at 8 bytes are 60 GiB: more than a card has, whatever else is done.
    assert closest.short_by_bytes > 60 * GIB - room.capacity
    assert any(one.change.startswith("method: lora") for one in found.nearest)
