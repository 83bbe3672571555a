"""States are sums that a person can check."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from memfit.physics.memory import (
    ALWAYS,
    FROM_FIRST_STEP,
    PartStates,
    Site,
    lifetimes,
    local_shapes,
    numel,
    packed_bytes,
    scale_bytes,
    share,
    state_terms,
)
from memfit.specs.ledger import PHASES

SOURCES = dict.fromkeys(("weights", "gradients", "gradient_copies", "master", "optimizer", "paged"), "source")
STATES = PartStates(
    part="language",
    frozen=100,
    frozen_width=2,
    packed=7,
    learning=30,
    width=4,
    gradients=15,
    gradient_copies=30,
    master=10,
    master_width=4,
    optimizer=80,
    paged=6,
)


def test_the_larger_share() -> None:
    assert [share(10, ways) for ways in (1, 2, 3, 4, 11)] == [10, 5, 4, 3, 1]


def test_what_the_worst_rank_holds() -> None:
    shapes = ((5, 3), (4,), ())
    assert local_shapes(shapes, 1, "part") == shapes
    assert local_shapes(shapes, 3, "part") == ((8,),)  # 15 + 4 + 1 = 20 elements, padded to 24: an even number each
    assert local_shapes(shapes, 3, "tensor") == ((5,), (2,), (1,))
    assert local_shapes(shapes, 3, "rows") == ((2, 3), (2,), ())
    assert local_shapes((), 4, "part") == ()
    assert numel(shapes) == 20
    with pytest.raises(ValueError, match="unknown unit"):
        local_shapes(shapes, 2, "columns")


def test_four_bit_storage() -> None:
    assert [packed_bytes(count) for count in (0, 1, 2, 3)] == [0, 1, 1, 2]
    assert scale_bytes(65, 64, 4, None, 0) == 8
    assert scale_bytes(64 * 256 + 1, 64, 1, 256, 1024) == 257 + 2 * 4 + 1024


def test_bytes_by_hand() -> None:
    assert STATES.bytes() == {
        "weights": 7 + 100 * 2 + 30 * 4,
        "gradients": 15 * 4,
        "gradient_copies": 30 * 4,
        "master": 10 * 4,
        "optimizer": 80,
        "paged": 6,
    }


def test_arrays_give_the_same_as_numbers() -> None:
    factors = np.array([1, 2, 5])
    fields = ("frozen", "packed", "learning", "gradients", "gradient_copies", "master", "optimizer", "paged")
    arrays = dataclasses.replace(STATES, **{name: getattr(STATES, name) * factors for name in fields})
    for index, factor in enumerate(factors):
        one = dataclasses.replace(STATES, **{name: getattr(STATES, name) * int(factor) for name in fields})
        assert {kind: size[index] for kind, size in arrays.bytes().items()} == one.bytes()
    assert list(share(np.array([10, 11]), 4)) == [3, 3]


def test_terms_sum_and_live() -> None:
    terms = state_terms(STATES, lifetimes(1), Site("gpu", 8), SOURCES)
    assert {term.id: term.bytes for term in terms} == {
        "weights.language": 327,
        "gradients.language": 60,
        "gradient_copies.language": 120,
        "master.language": 40,
        "optimizer.language": 80,
        "paged.language": 6 * 8,  # host memory holds those of all ranks
    }
    alive = {term.id.split(".")[0]: term.alive for term in terms}
    assert alive["weights"] == alive["master"] == PHASES
    assert alive["gradients"] == ("backward", "step")
    assert alive["optimizer"] == tuple(phase for phase in PHASES if phase != "load")
    assert {term.place for term in terms if term.id != "paged.language"} == {"gpu"}


def test_host_counts_all_ranks_of_the_node() -> None:
    terms = state_terms(STATES, lifetimes(1), Site("host", 2), SOURCES)
    assert sum(term.bytes for term in terms) == 2 * sum(STATES.bytes().values())
    assert all("x 2 ranks" in term.formula for term in terms)


def test_gradients_live_longer_when_they_accumulate() -> None:
    assert lifetimes(1).gradients == ("backward", "step")
    assert lifetimes(4).gradients == ("forward", "loss", "backward", "step")
    assert lifetimes(1, ("gradients",)).gradients == ALWAYS
    assert lifetimes(1, ("gradient copies",)).gradient_copies == ALWAYS
    assert lifetimes(3).of("optimizer") == FROM_FIRST_STEP


def test_what_is_zero_is_no_term_and_roles_have_their_own_ids() -> None:
    adapters = PartStates(part="vision", role="adapter", learning=3, width=4, gradients=3)
    assert [term.id for term in state_terms(adapters, lifetimes(1), Site("gpu"), SOURCES)] == [
        "adapter.weights.vision",
        "adapter.gradients.vision",
    ]
