"""A traced step against a real one, which is measured with torch's profiler and shares nothing with the tracer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

from benchmarks.trace_against_profiler import PHASES, cases, measure, request_for, traced_peak
from memfit.errors import UserError
from memfit.families import family_for
from memfit.inputs.model_source import find_model
from memfit.specs.recipe import ImageBudget
from memfit.specs.trace import StepTrace, TraceBatch
from memfit.testing.models import KINDS, NATIVE_KINDS
from memfit.trace import fakes
from memfit.trace.step import TraceRequest, trace_step
from tests.unit.conftest import VISION_KINDS

Folder = Callable[[str], Path]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dummy_request(folder: Path, *sets: str, rows: tuple[int, ...] = (90, 60), **options: Any) -> TraceRequest:
    """A request on a tiny model; the first row shows one picture of 300 x 200 px where the model takes any."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    images: tuple[Any, ...] = ()
    family = family_for(config)
    if family.images is not None:
        source = find_model(str(folder), {})
        settings = family.images.budget(source.config, source.preprocessor, ImageBudget())
        images = ((family.images.rule(settings, 300, 200),), *((),) * (len(rows) - 1))
    return request_for(config, TraceBatch(rows, images), *sets, **options)


def assert_equal(trace: StepTrace, request: TraceRequest, slack: int = 64) -> None:
    real = measure(request)
    if abs(trace.saved_bytes - real.held) > slack:
        real = measure(request)  # garbage of earlier tests that dies meanwhile is missing in what is held
    assert abs(trace.saved_bytes - real.held) <= slack, (trace.saved_bytes, real.held)
    for phase in PHASES:
        mine, theirs = traced_peak(trace, phase), real.peaks[phase]
        assert abs(mine - theirs) <= slack, (phase, mine, theirs)


# A few scalars differ: the fake of a 0-dim tensor is made where the real one is a number.
SCALARS = 256


@pytest.mark.parametrize("kind", [*KINDS, *NATIVE_KINDS])
def test_a_traced_step_equals_a_real_one(dummies: Folder, kind: str) -> None:
    """To a few bytes: with a picture, and padding, so that attention has a mask."""
    request = dummy_request(dummies(kind))
    assert_equal(trace_step(request), request, SCALARS)


LEVERS = {
    "lora with dropout": ("method=lora", "lora.dropout=0.05"),
    "lora under autocast": ("method=lora", "levers.precision=bf16-amp"),
    "dora": ("method=lora", "lora.variant=dora"),
    "pure bf16": ("levers.precision=pure-bf16",),
    "autocast": ("levers.precision=bf16-amp",),
    "eager": ("levers.attention=eager",),
    "last block": ("parts.language=last-1",),
}


@pytest.mark.parametrize("lever", LEVERS)
def test_levers_equal_a_real_step(dummies: Folder, lever: str) -> None:
    request = dummy_request(dummies("llama"), *LEVERS[lever])
    # bmm in 16 bit takes a scratchpad of some hundred bytes that is not modelled.
    assert_equal(trace_step(request), request, 1024)


@pytest.mark.parametrize("kind", ["llama", "qwen2_5_vl"])
@pytest.mark.parametrize("mode", ["full", "every-2"])
def test_checkpointing_equals_a_real_step(dummies: Folder, kind: str, mode: str) -> None:
    """With the 5,056 B of the generator's state that torch.utils.checkpoint keeps for every layer."""
    request = dummy_request(dummies(kind), f"levers.checkpointing={mode}")
    trace = trace_step(request)
    assert_equal(trace, request, 512)
    assert trace.saved_bytes < 0.75 * trace_step(dummy_request(dummies(kind))).saved_bytes


@pytest.mark.parametrize(
    "case", [case for case in cases() if case[0] in ("llama padded", "qwen2_5_vl")], ids=lambda c: c[0]
)
def test_larger_models_stay_within_a_thousandth(case: tuple[str, dict[str, Any], TraceBatch]) -> None:
    request = request_for(case[1], case[2])
    trace, real = trace_step(request), measure(request)
    assert real.held > 64 * 2**20
    assert trace.saved_bytes == pytest.approx(real.held, rel=1e-3)
    assert trace.saved_bytes == pytest.approx(real.hooked, rel=1e-3)
    for phase in PHASES:
        assert traced_peak(trace, phase) == pytest.approx(real.peaks[phase], rel=1e-3)


@pytest.mark.parametrize("kind", VISION_KINDS)
@pytest.mark.parametrize(("checkpointing", "device"), [("none", "cpu"), ("full", "gpu")])
def test_a_frozen_tower_keeps_nothing(dummies: Folder, kind: str, checkpointing: str, device: str) -> None:
    sets = ("parts.vision=frozen", "parts.connector=frozen", f"levers.checkpointing={checkpointing}")
    frozen = trace_step(dummy_request(dummies(kind), *sets, device=device))
    assert frozen.saved_by_part().get("vision", 0) == 0
    assert "vision" not in frozen.gradients
    trained = trace_step(dummy_request(dummies(kind), f"levers.checkpointing={checkpointing}", device=device))
    assert trained.saved_by_part()["vision"] > 0
    assert trained.gradients["vision"] > 0


def test_saved_rows_are_by_block_and_equal_blocks_keep_equal_bytes(dummies: Folder) -> None:
    trace = trace_step(dummy_request(dummies("llama"), rows=(80,)))
    blocks = {row.block: row.bytes for row in trace.saved if row.part == "language" and row.block is not None}
    assert set(blocks) == {0, 1}
    # The first block's input was made by the embedding, the last one's result is its own: one hidden state at most.
    assert abs(blocks[0] - blocks[1]) <= 80 * 64 * 4


def test_gradients_are_those_of_what_learns(dummies: Folder) -> None:
    request = dummy_request(dummies("qwen3"), "levers.precision=pure-bf16")
    trace = trace_step(request)
    from memfit.trace.parameters import read_profile

    profile = read_profile(request.config, request.family)
    assert sum(trace.gradients.values()) == 2 * sum(profile.part_numel().values())


def test_gradients_of_an_earlier_micro_batch_are_there_from_the_start(dummies: Folder) -> None:
    first = trace_step(dummy_request(dummies("llama")))
    later = trace_step(dummy_request(dummies("llama"), accumulated=True))
    grown = later.peak("forward").bytes - first.peak("forward").bytes
    assert grown == sum(first.gradients.values()) == sum(later.gradients.values())
    assert later.peak("forward").gradients == grown


def test_events_balance(dummies: Folder) -> None:
    """What stays after backward are the batch, the loss and the gradients: everything else was freed, once."""
    trace = trace_step(dummy_request(dummies("minicpmv4_6"), "levers.checkpointing=full"))
    alive: dict[int, int] = {}
    for event in trace.events:
        if event.kind == "alloc":
            assert event.storage not in alive
            alive[event.storage] = event.bytes
        elif event.kind == "free":
            assert alive.pop(event.storage) == event.bytes
    assert sum(alive.values()) - sum(trace.gradients.values()) <= trace.inputs + SCALARS


def test_a_peak_is_the_sum_of_its_roles(dummies: Folder) -> None:
    trace = trace_step(dummy_request(dummies("llava")))
    for row in (*trace.peaks, *trace.activation_peaks):
        assert row.bytes == row.inputs + row.saved + row.transient + row.gradients
    assert [row.phase for row in trace.peaks] == list(PHASES)


@pytest.mark.parametrize("kind", ["llama", "minicpmv4_6"])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_quick_way_of_fakes_changes_no_event(
    dummies: Folder, kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = dummy_request(dummies(kind), "levers.precision=bf16-amp", device=device)
    quick = trace_step(request)
    monkeypatch.setattr(fakes, "VIEWS", frozenset())
    monkeypatch.setattr(fakes, "FRESH", frozenset())
    assert in_order(trace_step(request)) == in_order(quick)


def test_the_short_way_to_the_meta_kernels_is_upstreams() -> None:
    """`_OnMeta` against torch's own manager: the same results, and the same state left behind, errors included."""
    made = fakes.Fakes()
    x = made.empty((4, 6), (6, 1), torch.bfloat16)

    def state() -> tuple[bool, bool]:
        return made.mode.in_kernel_invocation, torch._C._meta_in_tls_dispatch_include()

    for manager in (fakes._OnMeta, in_kernel_invocation_manager):
        before = state()
        with manager(made.mode):
            out = torch.ops.aten.view.default(x, [24])
            assert state() == (True, True)
        assert (out.device.type, tuple(out.shape), out.dtype) == ("meta", (24,), torch.bfloat16)
        assert not isinstance(out, FakeTensor)
        with pytest.raises(RuntimeError), manager(made.mode):
            torch.ops.aten.view.default(x, [23])
        assert state() == before == (False, False)


def in_order(trace: StepTrace) -> list[Any]:
    """Events, those that free at the same moment in the order of their storages."""
    found: list[Any] = []
    for event in trace.events:
        if event.kind == "free":
            if not found or not isinstance(found[-1], set):
                found.append(set())
            found[-1].add(event.storage)
        else:
            found.append(event)
    return found


def test_flops_of_a_dense_model_are_counted(dummies: Folder) -> None:
    """Forward: 2 FLOPs a weight of the matrices and token, and 4 T^2 per hidden element of attention."""
    trace = trace_step(dummy_request(dummies("llama"), rows=(64,)))
    config = json.loads((dummies("llama") / "config.json").read_text(encoding="utf-8"))
    hidden, ffn, vocabulary = 64, 96, config["vocab_size"]
    layer = hidden * hidden * 2 + hidden * 32 * 2 + 3 * hidden * ffn
    expected = 2 * 64 * (2 * layer + hidden * vocabulary) + 2 * 4 * 64 * 64 * hidden
    assert sum(row.flops for row in trace.flops if row.phase == "forward") == expected


def test_a_row_too_short_for_its_picture_is_refused(dummies: Folder) -> None:
    with pytest.raises(UserError, match="has no room for pictures"):
        trace_step(dummy_request(dummies("llava"), rows=(5,)))
