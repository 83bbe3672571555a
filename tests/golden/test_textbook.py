"""Published rules of thumb, to the digit. The figures on the left of each line stand in courses and papers."""

from __future__ import annotations

from typing import Any

import pytest

from memfit.physics.memory import PartStates, share
from memfit.physics.textbook import (
    CLAIMS,
    GB,
    SEVEN_B,
    VOLUME,
    image_bytes,
    mixed,
    training_states,
    zero_saving,
    zero_split,
)
from memfit.specs.plan import Layout
from memfit.strategies import STRATEGIES
from memfit.strategies.base import Request

VALUES = {claim.id: claim.value() for claim in CLAIMS}


@pytest.mark.parametrize(
    ("claim", "published"),
    [
        ("weights.fp32", 28),
        ("weights.fp16", 14),
        ("gradients.fp32", 28),
        ("gradients.fp16", 14),
        ("adam.mixed", 84),
        ("total.mixed", 112),
        ("adam.share", 75),
        ("ratio.fp32", 2),
        ("ratio.mixed", 3),
        ("inference", 14),
    ],
)
def test_a_7b_model(claim: str, published: int) -> None:
    assert VALUES[claim] == published


def test_ratios() -> None:
    one = training_states(SEVEN_B, "float32").bytes()
    assert one["gradients"] == one["weights"]
    assert one["optimizer"] == 2 * one["weights"]
    both = training_states(SEVEN_B, "float16", "float32")
    numbers = (both.learning, both.gradients, both.master + both.optimizer // 4)
    assert numbers == (SEVEN_B, SEVEN_B, 3 * SEVEN_B)
    # and the bytes behind 1 : 1 : 3 are 2 : 2 : 12
    assert [size // SEVEN_B for size in mixed(SEVEN_B).values()] == [2, 2, 0, 4, 8, 0]


@pytest.mark.parametrize(("claim", "limit"), [("zero1", 4), ("zero2", 8)])
def test_zero_at_many_ranks(claim: str, limit: int) -> None:
    assert VALUES[claim] == pytest.approx(limit, rel=1e-5)
    assert VALUES[claim] < limit


@pytest.mark.parametrize("ranks", [2, 64, 1024])
def test_zero_3_saves_as_many_times_as_there_are_ranks(ranks: int) -> None:
    # a count that divides: otherwise the worst rank holds a little more
    assert zero_saving(3, ranks, parameters=1024 * 10**6) == ranks


@pytest.mark.parametrize(("stage", "published"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_zero_papers_first_figure(stage: int, published: float) -> None:
    """arXiv:1910.02054, figure 1: 7.5 B parameters, 64 ranks, 12 bytes of optimizer state a parameter; GB."""
    states = mixed(7_500_000_000, zero_split(stage, 64))
    assert round(sum(states.values()) / GB, 1) == published


def states_of(layout: Layout, parameters: int) -> PartStates:
    """The same model under a layout of memfit's strategies."""
    stepped = share(parameters, layout.split_optimizer)
    return PartStates(
        part="model",
        learning=share(parameters, layout.split_parameters),
        width=2,
        gradients=share(parameters, layout.split_gradients),
        gradient_copies=layout.gradient_copies * share(parameters, layout.split_gradient_copies),
        master=stepped,
        master_width=4,
        optimizer=8 * stepped,
    )


@pytest.mark.parametrize(("stage", "copy"), [(1, 2), (2, 0), (3, 0)])
def test_what_memfit_plans_with_is_the_textbook_and_what_it_leaves_out(stage: int, copy: int) -> None:
    """DeepSpeed's stage 1 keeps 2 more bytes for each gradient of the slice that it owns; 2 and 3 are as taught."""
    ranks = 64
    taught = mixed(SEVEN_B, zero_split(stage, ranks))
    planned = states_of(STRATEGIES[f"zero{stage}"].layout(Request(ranks, master_width=4)), SEVEN_B).bytes()
    assert planned.pop("gradient_copies") == copy * SEVEN_B // ranks
    assert planned == {kind: size for kind, size in taught.items() if kind != "gradient_copies"}


def test_volumes() -> None:
    assert image_bytes(VOLUME) == 134_217_728  # 134 MB, 128 MiB
    assert image_bytes(VOLUME, batch=32) == 4_294_967_296
    assert VALUES["image.batch"] == pytest.approx(4.295, abs=0.0005)
    assert image_bytes(VOLUME, "float32", batch=32) == 4 * image_bytes(VOLUME, batch=32)


def test_minicpm_o_2_6_loads_at_about_17_gb() -> None:
    assert 16.5 < VALUES["minicpm-o-2.6"] < 17.5


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_planted_error_is_seen(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import memfit.physics.textbook as textbook

    honest = textbook.training_states

    def wrong(*args: Any, **kwargs: Any) -> PartStates:
        states = honest(*args, **kwargs)
        return PartStates(**{**states.__dict__, "optimizer": int(states.optimizer * factor)})

    monkeypatch.setattr(textbook, "training_states", wrong)
    claims = {claim.id: claim.value() for claim in CLAIMS}
    assert claims["adam.mixed"] != 84
    assert claims["total.mixed"] != 112
