"""QLoRA with DoRA in the trace: against bitsandbytes itself where it is installed, by hand everywhere."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import memfit
from benchmarks.trace_against_profiler import (
    PHASES,
    _hooked_bytes,
    _no_collection,
    _read,
    _real_batch,
    _step,
    request_for,
    traced_peak,
)
from memfit.build.arrange import Arranged, arrange
from memfit.build.load import random_model
from memfit.specs.recipe import Recipe
from memfit.specs.trace import StepTrace, TraceBatch
from memfit.trace.fourbit import LinearInFourBit
from memfit.trace.model import attention_name
from memfit.trace.step import TraceRequest, trace_step

TEXT = {"hidden_size": 64, "intermediate_size": 320, "num_hidden_layers": 5, "num_attention_heads": 4}
CONFIG: dict[str, Any] = {"model_type": "llama", **TEXT, "num_key_value_heads": 2, "vocab_size": 100}
TOKENS = 40
DORA = ("method=qlora", "lora.variant=dora", "levers.precision=pure-bf16")
# Two hidden states of 64 numbers, and scalars, that a real first step allocates elsewhere.
SLACK = 512


def traced(*sets: str) -> StepTrace:
    return trace_step(request_for(CONFIG, TraceBatch((TOKENS,)), *sets, device="gpu"))


def kept(trace: StepTrace, size: int) -> int:
    """Tensors of `size` bytes that forward made and that are alive when backward begins."""
    alive: dict[int, int] = {}
    for event in trace.events:
        if event.kind == "phase" and event.phase == "backward":
            break
        if event.kind == "alloc":
            alive[event.storage] = event.bytes
        elif event.kind == "free":
            alive.pop(event.storage, None)
    return sum(found == size for found in alive.values())


@pytest.mark.parametrize(("dtype", "width"), [("bf16", 2), ("fp32", 4)])
def test_with_dropout_autograd_keeps_every_unpacked_weight(dtype: str, width: int) -> None:
    """gate, up and down of every block, in the dtype of the adapters' input: what 4 bit saved comes back whole."""
    weight = width * 64 * 320
    without, dropped = (traced(*DORA, f"lora.dtype={dtype}", f"lora.dropout={share}") for share in ("0", "0.1"))
    assert kept(without, weight) == 0
    assert kept(dropped, weight) == 3 * 5
    checkpointed = traced(*DORA, f"lora.dtype={dtype}", "lora.dropout=0.1", "levers.checkpointing=full")
    assert kept(checkpointed, weight) == 0


def test_the_norm_unpacks_the_weight_once_more() -> None:
    """One unpacked weight for the product and one for the norm; backward unpacks once, as without DoRA."""
    lora, dora = (
        traced("method=qlora", "levers.precision=pure-bf16", "lora.dtype=bf16"),
        traced(*DORA, "lora.dtype=bf16"),
    )

    def unpacked(trace: StepTrace, phase: str) -> int:
        empty = [event for event in trace.events if event.op == "aten::empty" and event.phase == phase]
        return sum(event.kind == "alloc" and event.bytes == 2 * 64 * 320 for event in empty)

    assert (unpacked(lora, "forward"), unpacked(dora, "forward")) == (15, 30)
    assert unpacked(lora, "backward") == unpacked(dora, "backward") == 15


def test_a_forecast_of_it_is_whole(recipe: Callable[..., Recipe]) -> None:
    sets = ("data.train=null", "workload.tokens=64", "hardware.gpus=1xRTX3090", "levers.precision=auto")
    found = memfit.estimate(recipe("llama", *sets, "method=qlora", "lora.variant=dora"))
    assert found.verdict == "fits"
    assert set(found.ledger.missing) <= {"speed"}


def test_peft_still_does_what_the_stand_in_relies_on() -> None:
    assert 'hasattr(module, "W_q")' in inspect.getsource(dequantize_module_weight)
    layer = LinearInFourBit(nn.Linear(8, 6, bias=False), torch.float32)
    assert dequantize_module_weight(layer).shape == (6, 8)
    forward = inspect.getsource(DoraLinearLayer.forward)
    assert "base_result = F.linear(x, transpose(weight, self.fan_in_fan_out))" in forward
    variant = inspect.getsource(DoraLinearVariant.forward)
    assert "isinstance(dropout, nn.Identity) or not module.training" in variant
    assert "base_result = None" in variant


def quantised(request: TraceRequest) -> Arranged:
    """The real model with bitsandbytes' layers, adapted by `arrange` as every other."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model: Any = random_model(request.family, request.config, attention_name(request.recipe))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f"{name}.weight" in request.parts.quantised:
            new = bnb.nn.Linear4bit(
                *(module.in_features, module.out_features), bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            weight = module.weight.data.to(torch.bfloat16)
            # Without double quantisation, as the forecast has it.
            new.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, compress_statistics=False, quant_type="nf4", module=new
            )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.to("cpu"))
    model.is_loaded_in_4bit = True
    arranged = arrange(model, request.recipe, request.parts, request.family)
    arranged.model.train()
    return arranged


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("dropout", ["0", "0.1"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_traced_step_equals_bitsandbytes(variant: str, dropout: str, dtype: str, checkpointing: str) -> None:
    """On the CPU, where bitsandbytes 0.50 runs: the step is measured by torch's profiler."""
    sets = ("method=qlora", "levers.precision=pure-bf16", f"lora.variant={variant}", f"lora.dropout={dropout}")
    sets += (f"lora.dtype={dtype}", f"levers.checkpointing={checkpointing}")
    on_gpu = request_for(CONFIG, TraceBatch((TOKENS,)), *sets, device="gpu")
    request = dataclasses.replace(on_gpu, device="cpu")
    real, batch = quantised(request), _real_batch(request)
    hooked = _hooked_bytes(request, real, batch)
    with _no_collection(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        _step(request, real, batch, record_function)
    measured, trace = _read(records, hooked), trace_step(request)
    assert abs(trace.saved_bytes - measured.held) <= SLACK
    for phase in PHASES:
        assert abs(traced_peak(trace, phase) - measured.peaks[phase]) <= SLACK, phase
