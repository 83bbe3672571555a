"""The look before a trace, in which attention passes: the same blocks are left out, and the model stays as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks.trace_against_profiler import request_for
from memfit.trace import step
from memfit.trace.flash import PASSES, attention_passes
from memfit.trace.model import meta_model
from tests.unit.test_trace_repeat import deep

Folder = Callable[[str], Path]


@pytest.mark.parametrize("kind", ["minicpmv4_6", "qwen2_5_vl"])
def test_a_look_finds_what_a_whole_forward_finds(dummies: Folder, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_for(*deep(dummies(kind), kind), "method=lora", "levers.checkpointing=full")
    quick = step.record_step(request)

    @contextlib.contextmanager
    def nothing(model: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(step, "attention_passes", nothing)
    slow = step.record_step(request)
    assert quick.folds
    assert quick.folds == slow.folds
    assert quick.events == slow.events
    assert quick.flops == slow.flops


def test_the_attention_is_put_back(dummies: Folder) -> None:
    request = request_for(*deep(dummies("minicpmv4_6"), "minicpmv4_6"))
    model = meta_model(request.family, request.config, request.recipe, request.parts).model
    before = names(model)
    assert "sdpa" in before
    with attention_passes(model):
        assert set(names(model)) == {PASSES}
    assert names(model) == before


def names(model: nn.Module) -> list[str]:
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
