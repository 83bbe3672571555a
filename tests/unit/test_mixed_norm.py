"""A frozen 16-bit norm behind a part that learns in fp32: real CPU tensors refuse it, and so must the forecast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import memfit
from benchmarks.trace_against_profiler import _real_batch, _real_model, _step
from memfit.errors import UserError
from memfit.specs.recipe import Recipe
from memfit.trace.cpu import MixedNorm, workspace_bytes
from memfit.trace.step import TraceRequest, trace_step
from tests.unit.test_trace import dummy_request

Folder = Callable[[str], Path]
aten = torch.ops.aten
AMP = "levers.precision=bf16-amp"
BEHIND = ("method=lora", "parts.vision=full")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs(request: TraceRequest) -> bool:
    """Whether a real step of random weights passes on this CPU."""
    real = _real_model(request)
    return _passes(lambda: _step(request, real, _real_batch(request), lambda name: nullcontext()), "mixed dtype (CPU)")


def is_traced(request: TraceRequest) -> bool:
    return _passes(lambda: trace_step(request), "torch's CPU norms take no 16-bit weights")


def _passes(run: Callable[[], object], words: str) -> bool:
    """Whether `run` ends well. Any error but one with these words is a failure of the test."""
    try:
        run()
    except (RuntimeError, UserError) as error:
        if words not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "sets", "passes"),
    [
        ("minicpmv4_6", (*BEHIND, AMP), False),
        ("minicpmv4_6", ("parts.connector=frozen", "levers.precision=fp16-amp"), False),
        ("minicpmv4_6", (*BEHIND, "parts.connector=full", AMP), True),
        ("minicpmv4_6", (*BEHIND, "levers.precision=pure-bf16"), True),
        ("minicpmv4_6", ("parts.vision=last-1", "parts.connector=frozen", AMP), True),
        ("qwen2_5_vl", (*BEHIND, AMP), True),  # its merger begins with a norm written in Python
        ("llava", (*BEHIND, AMP), True),  # no norm in its projector
        ("minicpmv2_6", ("parts.connector=frozen", AMP), True),  # a product comes before the norm
    ],
)
def test_what_the_cpu_refuses_is_refused_and_nothing_else(
    dummies: Folder, kind: str, sets: tuple[str, ...], passes: bool
) -> None:
    request = dummy_request(dummies(kind), *sets)
    assert runs(request) == is_traced(request) == passes


def test_on_a_gpu_autocast_runs_norms_in_fp32(dummies: Folder) -> None:
    assert is_traced(dummy_request(dummies("minicpmv4_6"), *BEHIND, AMP, device="gpu"))


@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
def test_the_rule_is_the_kernels(given: torch.dtype, weight: torch.dtype) -> None:
    x, w = torch.ones(2, 8, dtype=given), torch.ones(8, dtype=weight)
    planes = torch.ones(2, 8, 4, dtype=given)
    for func, args in (
        (aten.native_layer_norm.default, (x, [8], w, w, 1e-5)),
        (aten.native_group_norm.default, (planes, w, w, 2, 8, 4, 2, 1e-5)),
    ):
        try:
            func(*args)
            passes = True
        except RuntimeError:
            passes = False
        if passes:
            assert workspace_bytes(func, args) == 0
        else:
            with pytest.raises(MixedNorm):
                workspace_bytes(func, args)


def test_estimate_and_train_say_it_in_one_line(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    wanted = recipe("minicpmv4_6", *BEHIND, AMP, "hardware.gpus=2xcpu")
    for command in (memfit.estimate, memfit.train):
        call: Any = command
        with pytest.raises(UserError) as error:
            call(wanted)
        assert "model.merger.mlp.0.pre_norm in bf16 (parts.connector: frozen)" in error.value.problem
        assert "\n" not in error.value.problem
        assert error.value.hint == "levers.precision: pure-bf16 or fp32, or parts.connector: full"
    assert not (tmp_path / "run").exists()
