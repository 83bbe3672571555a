"""Tapes of steps written by hand: loops, what they hand on, what is freed backwards; and what must be no tape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from memfit.inputs.shipped import packed
from memfit.inputs.tape_store import load_tapes, store_tapes
from memfit.specs.tape import WHOLE, Domain, SizeTerm
from memfit.specs.trace import Event, TraceBatch
from memfit.trace.folds import Fold
from memfit.trace.loops import Repeat, find_repeats
from memfit.trace.recording import Recording, settled
from memfit.trace.tape import Size, play, tape_of
from memfit.trace.tapes import make_tapes, played


class Writer:
    """Writes a recording event by event."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.made = 0

    def alloc(self, size: int, path: str, op: str = "aten::mm", phase: str = "forward") -> int:
        self.made += 1
        self.events.append(Event("alloc", self.made, size, phase, path, op))
        return self.made

    def free(self, storage: int, phase: str = "forward") -> None:
        size = next(event.bytes for event in self.events if event.storage == storage)
        self.events.append(Event("free", storage, size, phase, "", ""))


def step(rows: int, tokens: int) -> Recording:
    """A loop over chunks of 64 that hands a state on and keeps something, a loss, and a loop back."""
    write = Writer()
    write.events.append(Event("phase", -1, 0, "forward", "", ""))
    hidden = write.alloc(2 * rows * tokens * 32, "layers.0")
    padded = write.alloc(2 * rows * -(-tokens // WHOLE) * WHOLE * 32, "layers.0", "aten::pad") if tokens % WHOLE else 0
    state = write.alloc(rows * 4096, "layers.0", "aten::zeros")
    kept = []
    for _ in range(-(-tokens // WHOLE)):
        kept.append(write.alloc(rows * 64 * 32 * 2, "layers.0", "aten::bmm"))
        new = write.alloc(rows * 4096, "layers.0", "aten::add")
        write.free(state)
        state = new
    write.free(state)
    if padded:
        write.free(padded)
    logits = write.alloc(4 * rows * (tokens - 1) * 1000, "lm_head")
    write.events.append(Event("phase", -1, 0, "backward", "", ""))
    for storage in reversed(kept):
        grown = write.alloc(rows * 64 * 32 * 4, "layers.0", "aten::mul", "backward")
        write.free(storage, "backward")
        write.free(grown, "backward")
    for storage in (logits, hidden):
        write.free(storage, "backward")
    gradient = write.alloc(4096, "layers.0", "aten::mm", "backward")
    write.events.append(Event("gradient", gradient, 0, "backward", "layers.0.weight", ""))
    flops = {("forward", "layers.0"): 2 * rows * tokens * 32 * 32, ("backward", "lm_head"): 4 * rows * tokens * 32000}
    return Recording(
        device="gpu",
        substitutions=("flash",),
        parameters=1 << 20,
        inputs=8 * rows * tokens,
        events=tuple(write.events),
        marks=((1, ("language", 0)), (len(write.events) - 3, ("language", None))),
        folds=(Fold("language", (0,) * 6, (0, 1, 1, 1, 1, 5)),),
        flops=flops,
    )


SEEN: list[Size] = [(3, 397), (5, 460), (4, 533), (3, 701), (6, 830)]
HELD_OUT: list[Size] = [(3, 300), (8, 1001), (4, 999)]


def recordings(sizes: list[Size], record: Callable[[int, int], Recording] = step) -> dict[Size, Recording]:
    return {size: record(*size) for size in sizes}


def test_a_tape_plays_what_a_trace_would_give() -> None:
    tape = tape_of(recordings(SEEN), recordings(HELD_OUT))
    assert tape is not None
    assert play(tape, 7, 555) == step(7, 555)
    assert play(tape, 3, 999) == step(3, 999)
    assert len(tape.loops) == 2, "one over chunks, one back"
    assert len(tape.slots) < 40, "a loop is written once"


def test_lengths_without_padding_need_a_tape_of_their_own() -> None:
    whole = [(rows, -(-tokens // WHOLE) * WHOLE) for rows, tokens in SEEN]
    assert tape_of(recordings([*SEEN[:3], *whole[3:]]), recordings(HELD_OUT)) is None
    tapes = make_tapes(step, 300, 2000)
    assert {(tape.domain.rows[0], tape.domain.padded) for tape in tapes} == {
        (1, True),
        (1, False),
        (2, True),
        (2, False),
    }
    for size in ((1, 1024), (1, 1025), (5, 640), (2, 777)):
        batch = TraceBatch((size[1],) * size[0])
        assert played(tapes, batch) == step(*size), size


def test_outside_its_domain_nothing_is_played() -> None:
    tapes = make_tapes(step, 300, 2000, several=False)
    assert played(tapes, TraceBatch((299,))) is None
    assert played(tapes, TraceBatch((2001,))) is None
    assert played(tapes, TraceBatch((500, 500))) is None, "two rows"
    assert played(tapes, TraceBatch((500,), trained=(20,))) is None, "a loss over some tokens only"
    assert played(tapes, TraceBatch((500, 400))) is None, "unequal rows"


def test_a_tape_that_cannot_be_played_leaves_the_size_to_tracing() -> None:
    tape = tape_of(recordings(SEEN), recordings(HELD_OUT))
    assert tape is not None
    odd = dataclasses.replace(tape, functions=((SizeTerm(1, 7, "T"),),) * len(tape.functions))
    batch = TraceBatch((401,) * 3)
    assert played((odd,), batch) is None
    assert played((odd, tape), batch) == step(3, 401), "the next that holds is taken"
    middle = tuple(slot._replace(about=slot.about[1:2] or slot.about) for slot in tape.slots)
    never = dataclasses.replace(tape, slots=middle)
    assert played((never,), batch) is None, "the first round has none before it to free"


def changed(record: Recording, at: int, **values: object) -> Recording:
    events = list(record.events)
    events[at] = events[at]._replace(**values)
    return dataclasses.replace(record, events=tuple(events))


@pytest.mark.parametrize("of", ["seen", "held out"])
def test_one_byte_planted_anywhere_is_no_tape(of: str) -> None:
    seen, held_out = recordings(SEEN), recordings(HELD_OUT)
    victim = seen if of == "seen" else held_out
    size = next(iter(victim))
    for at in (1, 6, len(victim[size].events) - 2):
        event = step(*size).events[at]
        victim[size] = changed(step(*size), at, bytes=event.bytes + 1)
        assert tape_of(seen, held_out) is None, event
        victim[size] = step(*size)
    assert tape_of(seen, held_out) is not None


def test_other_flops_inputs_or_marks_are_no_tape() -> None:
    size = HELD_OUT[0]
    right = step(*size)
    for wrong in (
        dataclasses.replace(right, inputs=right.inputs + 8),
        dataclasses.replace(right, flops={key: value + 2 for key, value in right.flops.items()}),
        dataclasses.replace(right, marks=right.marks[:1]),
        dataclasses.replace(right, parameters=1),
    ):
        held_out = {**recordings(HELD_OUT), size: wrong}
        assert tape_of(recordings(SEEN), held_out) is None


def test_lengths_too_close_are_refused() -> None:
    with pytest.raises(ValueError, match="less than 640 apart"):
        make_tapes(step, 300, 900)


def test_three_recordings_must_stay_out() -> None:
    with pytest.raises(ValueError, match="3 other"):
        tape_of(recordings(SEEN), recordings(HELD_OUT[:2]))


def test_files_keep_a_tape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path))
    tapes = make_tapes(step, 300, 2000)
    store_tapes("key", tapes)
    assert load_tapes("key") == tapes
    assert load_tapes("other") == ()
    (tmp_path / "tapes" / "key.json").write_text('{"tapes": [{}]}', encoding="utf-8")
    assert load_tapes("key") == (), "a file that cannot be read is no tape"
    assert len(packed({"tapes": 1})) < 100


def test_repeats_cover_most_and_do_not_overlap() -> None:
    assert find_repeats("xababababy") == (Repeat(1, 2, 4),)
    assert find_repeats("aabaabaab") == (Repeat(0, 3, 3),), "the larger loop goes first"
    assert find_repeats("aaabbb") == (Repeat(0, 1, 3), Repeat(3, 1, 3))
    assert find_repeats("abab") == ()


def test_what_is_freed_together_is_freed_in_the_order_it_was_made() -> None:
    events = [Event("free", number, 1, "forward", "", "") for number in (3, 1, 2)]
    assert [event.storage for event in settled(events, [])] == [1, 2, 3]
    assert [event.storage for event in settled(events, [(1, ("language", 0))])] == [3, 1, 2], "a mark stands between"


def test_domain_ends_are_inside() -> None:
    domain = Domain((1, 2), (64, 128), padded=False)
    assert [domain.holds(*size) for size in ((1, 64), (2, 128))] == [True, True]
    assert [domain.holds(*size) for size in ((3, 64), (1, 65), (1, 192))] == [False, False, False]
