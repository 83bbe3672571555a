"""The trace under ZeRO-3: Linears as DeepSpeed runs them, and which modules an engine is told of."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memfit.build.checkpointing import selective_contexts
from memfit.strategies import STRATEGIES
from memfit.trace import zero
from memfit.trace.cuda import ROWS
from memfit.trace.step import StepTrace, trace_step
from memfit.trace.stretches import stretches, wrappers
from tests.unit.test_trace import dummy_request

Folder = Callable[[str], Path]
LORA = ("method=lora", "levers.precision=pure-bf16")


def under_zero3(folder: Path, *sets: str) -> StepTrace:
    return trace_step(dataclasses.replace(dummy_request(folder, *sets), replaced=STRATEGIES["zero3"].replaces))


def made(trace: StepTrace) -> list[tuple[str, int, str]]:
    return [(event.kind, event.bytes, event.phase) for event in trace.events]


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llama"])
@pytest.mark.parametrize(
    "sets", [(), ("levers.checkpointing=selective", "levers.loss=chunked")], ids=["plain", "again"]
)
def test_linears_make_what_deepspeeds_own_make(
    dummies: Folder, kind: str, sets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every allocation and free of a step, with the stand-in and with upstream's function in its place; layers and the
    loss computed again in backward too."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    upstream = pytest.importorskip("deepspeed.runtime.zero.linear")
    sets = (*LORA, *sets)
    trace, plain = under_zero3(dummies(kind), *sets), trace_step(dummy_request(dummies(kind), *sets))
    monkeypatch.setattr(zero, "_linear", upstream.zero3_linear_wrap)
    assert made(trace) == made(under_zero3(dummies(kind), *sets))
    assert made(trace) != made(plain)
    assert trace.substitutions == ("zero3-linear",)
    assert {"zero3-linear"} <= set(ROWS)


def test_a_frozen_linear_keeps_its_input(dummies: Folder) -> None:
    """The head is frozen: its input, T x D in 16 bit, is what no other operator keeps."""
    request = dummy_request(dummies("llama"), *LORA)
    plain, found = trace_step(request), under_zero3(dummies("llama"), *LORA)
    tokens = len(request.batch.rows) * max(request.batch.rows)
    outside = [sum(row.bytes for row in one.saved if row.block is None) for one in (plain, found)]
    assert outside[1] - outside[0] == tokens * request.config["hidden_size"] * 2


def test_selective_checkpointing_is_wrong_where_a_linear_has_a_bias() -> None:
    """`recipe_rules`: the product that selective checkpointing keeps gets its bias in place, and again in backward."""
    wrap = pytest.importorskip("deepspeed.runtime.zero.linear").zero3_linear_wrap
    torch.manual_seed(0)
    layers, x = [nn.Linear(8, 8) for _ in range(2)], torch.randn(2, 3, 8, requires_grad=True)

    def gradient(selective: bool) -> torch.Tensor:
        def run(value: torch.Tensor) -> torch.Tensor:
            for layer in layers:
                value = torch.sin(wrap(value, layer.weight, layer.bias))
            return value

        out = checkpoint(run, x, use_reentrant=False, context_fn=selective_contexts) if selective else run(x)
        return torch.autograd.grad(out.sum(), x)[0]

    assert not torch.allclose(gradient(True), gradient(False), atol=0.01)
    for layer in layers:
        nn.init.zeros_(layer.bias)
    assert torch.allclose(gradient(True), gradient(False))


def test_what_an_adapter_computes_is_no_visit_of_its_layer(dummies: Folder) -> None:
    """The first block's q_proj is frozen and its input has no gradient: in backward its wrapper has a part, it has
    none. PEFT's wrapper owns no parameter."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    trace = under_zero3(dummies("llama"), *LORA, "lora.targets=[q_proj]")
    rows = stretches(trace.events, lambda path: ("language", None))
    name = "model.layers.0.self_attn.q_proj"
    assert name in {row.module for row in rows if row.phase == "forward"}
    backward = {row.module for row in rows if row.phase == "backward"}
    assert f"{name}.adapter" in backward
    assert name not in backward
    assert any(path.endswith(name) for path in wrappers(trace.events))
    wrapped = Linear(nn.Linear(2, 2), adapter_name="default", config=LoraConfig(r=1), r=1)
    assert not list(wrapped.parameters(recurse=False))


def test_a_module_whose_results_were_kept_is_visited_again(dummies: Folder) -> None:
    """Selective checkpointing runs the first block's q_proj again and makes nothing: its parameters are gathered."""
    trace = under_zero3(dummies("llama"), *LORA, "levers.checkpointing=selective", "lora.targets=[q_proj]")
    rows = stretches(trace.events, lambda path: ("language", None))
    assert "model.layers.0.self_attn.q_proj" in {row.module for row in rows if row.phase == "backward"}


def test_a_head_that_hands_its_input_on_is_visited(dummies: Folder) -> None:
    """The chunked loss multiplies later; the engine gathers the head when the model's forward comes to it."""
    trace = under_zero3(dummies("llama"), *LORA, "levers.loss=chunked")
    rows = stretches(trace.events, lambda path: ("language", None))
    assert "lm_head" in {row.module for row in rows if row.phase == "forward"}


def test_doras_module_reads_a_weight_that_it_does_not_own() -> None:
    """`engine_stages.READS_WEIGHT`: DeepSpeed registers such a weight with the module that read it."""
    from peft.tuners.lora.dora import DoraLinearLayer

    offload = pytest.importorskip("deepspeed.runtime.zero.parameter_offload")
    assert "dequantize_module_weight(base_layer)" in inspect.getsource(DoraLinearLayer.forward)
    assert [name for name, _ in DoraLinearLayer(False).named_parameters()] == []
    assert "register_external_parameter(FWD_MODULE_STACK[-1], param)" in inspect.getsource(offload.ZeROOrderedDict)
