"""What each strategy's layout adds to a step, by hand: collectives, the optimizer's bytes, traffic with the host."""

from __future__ import annotations

import dataclasses

import pytest

from memfit.physics.engine_work import Ranks, States, with_layout
from memfit.physics.speed import Rates, StepWork, step_time
from memfit.strategies import STRATEGIES
from memfit.strategies.base import Request

# 1,000 elements, 100 of them learn: 16-bit weights and gradients, an fp32 copy and two moments; 10 modules.
STATES = States(elements=1000, learning=100, width=2, gradient=2, master=4, moments=8, modules=10)
NOTHING = StepWork(flops=0.0)


def added(name: str, ranks: int = 4, offload: str = "none", overlaps: bool = False) -> dict[str, float]:
    """The fields that a strategy changes, over 2 micro-batches."""
    request = Request(ranks=ranks, width=2, compute_width=2, master_width=4, hidden=64, offload=offload)
    before = StepWork(flops=0.0, micro_batches=2)
    after = with_layout(before, STATES, STRATEGIES[name].layout(request), Ranks(ranks, ranks, overlaps))
    old, new = dataclasses.asdict(before), dataclasses.asdict(after)
    return {key: float(value) for key, value in new.items() if value != old[key] and key != "ranks"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # The copy is read and written, gradients are read, moments both, and the 16-bit weights written: 8+2+16+2 = 28.
        ("none", {"optimizer_bytes": 2800}),
        ("ddp", {"optimizer_bytes": 2800, "step_reduced_bytes": 200, "link_window": pytest.approx(1 / 3)}),
        ("zero1", {"optimizer_bytes": 700, "step_scattered_bytes": 200, "step_gathered_bytes": 200}),
        ("zero2", {"optimizer_bytes": 700, "scattered_bytes": 200, "step_gathered_bytes": 200}),
        (
            "zero3",
            {"optimizer_bytes": 700, "gathered_bytes": 4000, "scattered_bytes": 200, "engine_calls": 30},
        ),
        ("fsdp", {"optimizer_bytes": 700, "gathered_bytes": 4000, "scattered_bytes": 200}),
    ],
)
def test_layouts(name: str, expected: dict[str, float]) -> None:
    assert added(name, ranks=1 if name == "none" else 4) == expected


def test_offload() -> None:
    """Each rank sends 25 gradients and fetches 25 weights; the node's optimizer moves 30 bytes of each of the 100."""
    sent = {"step_down_bytes": 50, "step_up_bytes": 50, "host_optimizer_bytes": 3000}
    assert added("zero2", offload="optimizer") == sent | {"scattered_bytes": 200, "step_gathered_bytes": 200}
    everything = added("zero3", offload="params+optimizer")
    assert everything["up_bytes"] == 2 * 2 * 1000 / 4
    assert {key: everything[key] for key in sent} == sent


def test_overlap_is_the_engines() -> None:
    assert added("zero3", overlaps=True)["hidden_links"] == 1.0
    assert "hidden_links" not in added("zero3")


def test_an_all_reduce_hides_behind_the_last_backward_only() -> None:
    """8 s of computing in 4 micro-batches: the last backward takes 8 x 2/3 / 4 = 1.33 s; the links need 3 s."""
    work = StepWork(flops=200.0, micro_batches=4)
    after = with_layout(work, STATES, STRATEGIES["ddp"].layout(Request(ranks=2)), Ranks(2, 2, overlaps=True))
    rates = Rates(100.0, 1e9, 200 / 3, product_share=1.0, memory_share=1.0)
    found = step_time(after, rates)
    assert float(found.parts["links"]) == pytest.approx(3 - 8 * 2 / 3 / 4)


def test_more_ranks_never_make_the_optimizer_slower() -> None:
    steps = [added("zero2", ranks=ranks)["optimizer_bytes"] for ranks in (2, 4, 8)]
    assert steps == sorted(steps, reverse=True)
    assert with_layout(NOTHING, STATES, STRATEGIES["none"].layout(Request(ranks=1)), Ranks(1, 1)).ranks == 1
