"""Tapes of real tiny models: played without torch, they give what tracing gives, to the byte."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.trace_against_profiler import request_for
from memfit.families import family_for
from memfit.inputs.model_source import find_model
from memfit.specs.recipe import ImageBudget
from memfit.specs.trace import TraceBatch
from memfit.trace.recording import Recording, step_of
from memfit.trace.request import TraceRequest
from memfit.trace.step import recorded_step
from memfit.trace.tape import play, tape_of
from memfit.trace.tapes import make_tapes, played

Folder = Callable[[str], Path]


def request_of(folder: Path, *sets: str) -> TraceRequest:
    """A GPU request of a tiny model, with a picture where it takes any."""
    source = find_model(str(folder), {})
    family = family_for(source.config)
    images: tuple[tuple[object, ...], ...] = ()
    if family.images is not None:
        settings = family.images.budget(source.config, source.preprocessor, ImageBudget())
        images = ((family.images.rule(settings, 300, 200),),)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    batch = TraceBatch((100,), images)  # type: ignore[arg-type]
    return request_for(config, batch, *sets, device="gpu")


def at(request: TraceRequest, rows: int, tokens: int) -> TraceRequest:
    batch = TraceBatch((tokens,) * rows, request.batch.images * rows)
    return dataclasses.replace(request, batch=batch)


def recorder(request: TraceRequest) -> Callable[[int, int], Recording]:
    return lambda rows, tokens: recorded_step(at(request, rows, tokens))[0]


# kind, recipe, lengths that a function sees, lengths held out, length played
SEEN, HELD_OUT = (341, 403, 470, 598, 731), (325, 555, 801)
CASES = {
    "LoRA, chunked loss": ("llama", ("method=lora", "levers.loss=chunked"), 3500),
    "vision frozen, checkpointed": ("qwen2_5_vl", ("parts.vision=frozen", "levers.checkpointing=full"), 0),
    "linear attention in chunks": ("minicpmv4_6", ("method=lora",), 300),
    "crops in one call": ("minicpmv2_6", ("levers.precision=bf16-amp",), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_played_equals_traced(dummies: Folder, case: str) -> None:
    kind, sets, more = CASES[case]
    request = request_of(dummies(kind), *sets)
    record = recorder(request)
    seen, held_out = ({(1, more + length): record(1, more + length) for length in each} for each in (SEEN, HELD_OUT))
    tape = tape_of(seen, held_out)
    assert tape is not None
    recording, step = recorded_step(at(request, 1, more + 654))
    found = play(tape, 1, more + 654)
    assert found == recording
    assert step_of(found, request.family) == step


def test_rows_and_lengths_of_all_kinds(dummies: Folder) -> None:
    request = request_of(dummies("llama"))
    tapes = make_tapes(recorder(request), 100, 900)
    for rows, tokens in ((1, 500), (2, 333), (7, 640)):
        assert played(tapes, at(request, rows, tokens).batch) == recorded_step(at(request, rows, tokens))[0]
