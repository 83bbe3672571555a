"""What engines gather, hold in buckets and copy, against schedules worked out by hand."""

from __future__ import annotations

import pytest

from memfit.errors import UserError
from memfit.physics.engine import Arrival, Stage, peak_places, walk
from memfit.physics.gather import ROOT, BlockVisit, by_block, by_module
from memfit.physics.memory import largest_touched
from memfit.planner.interval import WIDTHS, interval_of, uncertainty
from memfit.specs.engine_numbers import EngineNumbers
from memfit.specs.ledger import Term
from memfit.strategies import STRATEGIES
from memfit.strategies.base import Request

# Three modules of one parameter each, 10, 20 and 30 elements of 2 bytes, forward and back.
ELEMENTS = [10, 20, 30]
BYTES = [20, 40, 60]
VISITS = [[0], [1], [2], [2], [1], [0]]


def modules(**numbers: int) -> list[int]:
    values = {"live_elements": 10**9, **numbers}
    return [held for held, _ in by_module(VISITS, ELEMENTS, BYTES, EngineNumbers(gather="module", **values))]


def test_one_module_at_a_time() -> None:
    """Nothing ahead and nothing kept: each module's own bytes."""
    assert modules() == [20, 40, 60, 60, 40, 20]


def test_what_is_used_again_soon_is_kept() -> None:
    """The third is used again at once; the second after 2 x 30 elements, the first after 2 x 20 more."""
    assert modules(reuse_elements=1) == [20, 40, 60, 60, 40, 20]  # the third stays between its two visits
    assert modules(reuse_elements=61) == [20, 40, 100, 100, 40, 20]
    assert modules(reuse_elements=101) == [20, 60, 120, 120, 60, 20]


def test_prefetch_runs_ahead_to_the_limit() -> None:
    """Looking 5 elements ahead at every module fetches the next parameter as a whole."""
    found = modules(prefetch_elements=5)
    # The first with the second on its way, then the second with the third.
    assert found[0] == 20 + 40
    assert found[1] == 40 + 60
    assert max(found) <= sum(BYTES)
    assert modules(prefetch_elements=5, live_elements=10)[0] == 20


def test_small_parameters_are_never_gathered() -> None:
    assert modules(persistent_elements=20) == [0, 0, 60, 60, 0, 0]


def test_several_parameters_of_one_module_share_a_flat_buffer() -> None:
    """At the moment they leave it, buffer and parameters exist: twice 60 B; then the parameters alone."""
    assert by_module([[0, 1]], ELEMENTS, BYTES, EngineNumbers(gather="module", live_elements=10**9)) == [(60, 120)]


def test_waiting_for_one_copies_all_of_its_collective() -> None:
    """The second and third (100 B) come in one buffer while the first (20 B) runs. The second's wait copies both, the
    buffer stays for the third: 200 B; then the third's copy and the buffer, of which only the copy is left."""
    engine = EngineNumbers(gather="module", live_elements=10**9, prefetch_elements=50)
    assert by_module([[0], [1], [2]], ELEMENTS, BYTES, engine) == [(120, 20), (200, 200), (60, 160)]


def test_blocks_and_the_root() -> None:
    """Root 100, blocks 10 and 20: block and the last collective's buffer forward, block and the next buffer back."""
    visits = [
        BlockVisit(ROOT, False),
        BlockVisit(0, False),
        BlockVisit(1, False),
        BlockVisit(ROOT, False),
        BlockVisit(ROOT, False, loss=True),
        BlockVisit(ROOT, True),
        BlockVisit(1, True),
        BlockVisit(0, True),
    ]
    stays = EngineNumbers(gather="block", collective_copy=True, root_stays=True)
    assert by_block(visits, [10, 20], 100, stays) == [200, 120, 140, 120, 100, 100, 130, 110]
    goes = EngineNumbers(gather="block", collective_copy=True)
    assert by_block(visits, [10, 20], 100, goes)[4] == 0


def gradients(engine: EngineNumbers, partition: int = 0, accumulated: int = 0) -> dict[str, list[int]]:
    """Gradients of 10, 20 and 30 elements (2 B) arrive from the last to the first, then backward ends."""
    stages = [Stage()]
    whole = 0
    for place, offset in ((2, 30), (1, 10), (0, 0)):
        whole += BYTES[place]
        kept = BYTES[place] // 2 if engine.keep_ways > 1 else 0
        stages.append(
            Stage(whole=whole, arrival=Arrival(ELEMENTS[place], BYTES[place], offset, kept, place < 2, place))
        )
    stages.append(Stage(whole=whole, ends_backward=True))
    return walk(stages, engine, 60, partition, accumulated)


def test_whole_gradients_stay() -> None:
    found = gradients(EngineNumbers())
    assert found["kept"] == [0, 60, 100, 120, 120]
    assert not any(sum(sizes) for name, sizes in found.items() if name != "kept")


def test_a_bucket_takes_gradients_and_is_copied_when_it_is_uneven() -> None:
    """A bucket of 35: 30 go in; 20 more do not fit, so the 30 are reduced (one tensor, 2 ranks divide it: no copy), and
    then 20 + 10 are two tensors: a copy of 60 B at the end. Each gradient itself exists as it arrives."""
    engine = EngineNumbers(keep_ways=0, bucket_elements=35, bucket_width=2, buckets=1, ranks=2, copy_when="uneven")
    found = gradients(engine)
    assert found["bucket"] == [0, 70, 70, 70, 70]
    assert found["waiting"] == [0, 60, 40, 20, 0]
    assert found["copy"] == [0, 0, 0, 0, 60]


def test_a_gradient_larger_than_the_bucket_waits_for_the_next() -> None:
    engine = EngineNumbers(keep_ways=0, bucket_elements=15, bucket_width=2, buckets=2, ranks=2, copy_when="never")
    found = gradients(engine)
    # 30 waits; 20 arrives beside it and waits in its place; 10 fits into the bucket.
    assert found["waiting"] == [0, 60, 60 + 40, 40 + 20, 0]
    assert found["bucket"][1:] == [60, 60, 60, 60]


def test_the_own_share_is_made_at_the_first_reduction() -> None:
    engine = EngineNumbers(keep_ways=0, bucket_elements=35, bucket_width=2, buckets=1, ranks=2, partition_ways=2)
    assert gradients(engine, partition=64)["partition"] == [0, 0, 64, 64, 64]
    assert gradients(engine, partition=64, accumulated=64)["partition"] == [64, 64, 128, 128, 128]


def test_a_new_share_comes_when_the_copy_of_the_bucket_has_gone() -> None:
    """All fits into one bucket, reduced at the end: a copy of 120 B, then the share of 64 B in its place; together they
    never are more than the copy. With a smaller bucket the share is there when the next copy (of 60 B) is made."""
    values = {"keep_ways": 0, "bucket_width": 2, "buckets": 1, "ranks": 2, "partition_ways": 2}
    found = gradients(EngineNumbers(bucket_elements=100, copy_when="spans-ranks", **values), partition=64)  # type: ignore[arg-type]
    assert [found["copy"][-1], found["partition"][-1]] == [120 - 64, 64]
    found = gradients(EngineNumbers(bucket_elements=35, copy_when="uneven", **values), partition=64)  # type: ignore[arg-type]
    assert [found["copy"][-1], found["partition"][-1]] == [60, 64]


def test_blocks_reduce_when_their_last_gradient_is_there() -> None:
    """Units 0 and 1 finish with their own gradient, unit 2 (the root) with backward; inputs are fp32."""
    engine = EngineNumbers(keep_ways=2, keep_width=4, scatter_width=4, ranks=2)
    found = gradients(engine)
    assert found["waiting"] == [0, 60, 60 + 40, 60 + 20, 60]
    assert found["scatter"] == [0, 0, 80, 40, 120]
    assert found["kept"] == [0, 0, 20, 30, 60]


def test_the_first_of_equal_moments_is_the_peak() -> None:
    places = peak_places(["forward", "forward", "backward"], [[5, 5, 1], [1, 2, 3]])
    assert places["forward"].tolist() == [0, 1]
    assert places["backward"].tolist() == [2, 2]


def test_tensors_at_the_edge_of_a_share_stay_whole() -> None:
    """10 + 20 + 30 in two shares of 30: the first touches 10 and 20, the second 30; shares of 20 cut the third."""
    assert largest_touched([10, 20, 30], 30, 2) == 30
    assert largest_touched([10, 20, 30], 20, 3) == 20 + 30


def test_engine_values() -> None:
    zero3 = STRATEGIES["zero3"].layout
    auto = zero3(Request(2, hidden=100, values={"zero": {"reduce_bucket_size": "auto"}})).engine
    assert auto.bucket_elements == 100 * 100
    assert zero3(Request(2)).engine.bucket_elements == 500_000_000
    doubled = STRATEGIES["zero2"].layout(Request(2, values={"zero": {"overlap_comm": True}})).engine
    assert doubled.buckets == 2
    for wrong, words in (
        ({"zero": {"reduce_bucket_size": "large"}}, "is not a number"),
        ({"zero": {"overlap_comm": 1}}, "is not true or false"),
        ({"zero": {"reduce_bucket_size": -1}}, "at least 0"),
        ({"zero": {"bucket": 1}}, "without a price"),
        ({"zero": 5}, "not a mapping"),
        ({"fsdp": {}}, "says nothing to this engine"),
    ):
        with pytest.raises(UserError, match=words):
            zero3(Request(2, values=wrong))


def test_interval_adds_within_a_class_and_in_squares_between() -> None:
    def term(name: str, size: int, place: str = "gpu") -> Term:
        return Term(name, name, "p", place, ("backward",), size, "source")  # type: ignore[arg-type]

    states = [term("weights.language", 1000), term("zero3.reduce_bucket", 500)]
    exact = interval_of(states)
    assert (exact.low_bytes, exact.high_bytes) == (1500, 1500)
    # Two traced terms: 5% of 800; an engine's: 10% of 300. 40 and 30 are 50 together.
    more = [
        *states,
        term("activations.backward", 600),
        term("transient.backward", 200),
        term("zero3.gathered.backward", 300),
    ]
    assert interval_of(more).high_bytes == 2600 + 50
    assert interval_of(more).low_bytes == 2600 - 50
    assert {uncertainty(term("context.cuda", 1, "context")), uncertainty(term("comm.nccl", 1, "comm"))} == {
        "context",
        "comm",
    }
    assert uncertainty(term("gradients.so_far.backward", 1)) == "traced"
    assert uncertainty(term("transient.evaluate", 1)) == "evaluation"
    assert all(row.why for row in WIDTHS.values())
