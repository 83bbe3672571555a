"""Whole copies beside adapters (`lora.modules_to_save`): the traced step learns what the states count as learning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from memfit.inputs.recipe_file import load_recipe
from memfit.trace.prepare import prepare
from memfit.trace.step import trace_step
from tests.unit.test_trace import SCALARS, assert_equal, dummy_request

CASES = {
    "llama": ("embed_tokens",),
    "minicpmv2_6": ("embed_tokens", "resampler", "vpm"),
    "qwen2_5_vl": ("visual.merger",),
}


@pytest.mark.parametrize("kind", CASES)
def test_copies_learn_in_the_trace(dummies: Callable[[str], Path], kind: str) -> None:
    """Bytes of a real step by torch's profiler; gradients of every copy; what a frozen tower would not keep is kept."""
    saved = f"lora.modules_to_save=[{', '.join(CASES[kind])}]"
    request = dummy_request(dummies(kind), "method=lora", saved)
    trace = trace_step(request)
    assert_equal(trace, request, SCALARS)
    sets = ["hardware.gpus=1xcpu", "method=lora", "levers.precision=fp32"]
    counted, alone = (
        prepare(load_recipe(None, [*sets, *more], model=str(dummies(kind)))).plan().forecast.trainable
        for more in ([saved], [])
    )
    copies = {part: 4 * (counted[part] - alone[part]) for part in counted if counted[part] > alone[part]}
    plain = trace_step(dummy_request(dummies(kind), "method=lora")).gradients
    grown = {part: size - plain.get(part, 0) for part, size in trace.gradients.items() if size > plain.get(part, 0)}
    assert grown == copies
    if "vision" in copies:
        assert trace.saved_by_part()["vision"] > 0
