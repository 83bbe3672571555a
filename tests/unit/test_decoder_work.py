"""The formulas for a plain decoder against transformers' own Llama: products exactly, kernels and bytes roughly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.trace_against_profiler import request_for
from memfit.physics.decoder import DecoderRun, DecoderShape, decoder_work
from memfit.physics.rates import TRAFFIC_PER_WRITTEN, traced_work
from memfit.specs.trace import TraceBatch
from memfit.trace.step import trace_step

# Only move a tensor's description.
VIEWS = {"view", "_unsafe_view", "t", "transpose", "expand", "unsqueeze", "slice", "select", "detach", "alias"}
VIEWS |= {"permute", "squeeze", "as_strided", "split", "unbind", "split_with_sizes", "_reshape_alias", "lift_fresh"}
PRODUCTS = {"mm", "addmm", "bmm", "embedding", "embedding_dense_backward"}
PRODUCTS |= {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"}
HIDDEN, FEED_FORWARD, VOCABULARY, TOKENS = 128, 352, 512, 256


class Count(TorchDispatchMode):
    """Kernels, bytes that those other than products read and write, and bytes that all put into new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes, self.written = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name not in VIEWS:
            self.kernels += 1
            if not name.endswith("_"):
                new = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
                self.written += sum(one.numel() * one.element_size() for one in new)
            if name not in PRODUCTS:
                tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, torch.Tensor)]
                self.bytes += sum(one.numel() * one.element_size() for one in tensors)
        return out


def model(layers: int, checkpointing: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        intermediate_size=FEED_FORWARD,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    made = LlamaForCausalLM(config).to(torch.bfloat16).train()
    if checkpointing:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made


def step(made: LlamaForCausalLM, mode: Any) -> Any:
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    with mode:
        made(input_ids=ids, labels=ids).loss.backward()
    return mode


def shape(layers: int) -> DecoderShape:
    return DecoderShape(HIDDEN, layers, FEED_FORWARD, VOCABULARY, HIDDEN)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_products_are_those_that_torch_counts(checkpointing: bool) -> None:
    """torch's counter has no formula for the CPU's attention, which is left out here too. Everything learns."""
    counted = step(model(2, checkpointing), FlopCounterMode(display=False)).get_total_flops()
    whole = shape(2)
    learning = 2 * whole.layer_parameters + whole.head_parameters
    work = decoder_work(whole, DecoderRun(TOKENS, learning=learning, checkpointing=checkpointing))
    attention = 2 * 4 * TOKENS * TOKENS * HIDDEN * 0.5
    expected = work.flops + work.recompute_flops - attention * (4 if checkpointing else 3)
    # Checkpointing stops recomputing once it has what backward needs: the last matrix of a layer is not run again.
    spared = 2 * TOKENS * 2 * HIDDEN * FEED_FORWARD if checkpointing else 0
    assert counted in (expected, expected - spared)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_kernels_and_bytes_of_a_layer(checkpointing: bool) -> None:
    one, two = (step(model(layers, checkpointing), Count()) for layers in (1, 2))
    works = [decoder_work(shape(layers), DecoderRun(TOKENS, checkpointing=checkpointing)) for layers in (1, 2)]
    assert float(works[1].kernels - works[0].kernels) == pytest.approx(two.kernels - one.kernels, rel=0.2)
    expected = float(works[1].elementwise_bytes - works[0].elementwise_bytes)
    assert expected == pytest.approx(two.bytes - one.bytes, rel=0.2)
    ratio = (two.bytes - one.bytes) / (two.written - one.written)
    assert ratio == pytest.approx(TRAFFIC_PER_WRITTEN, rel=0.05)


def test_a_traced_step_says_what_it_writes(dummies: Callable[[str], Path]) -> None:
    """The tracer's count of a tiny text model against a real step of it, in new bytes and in kernels."""
    folder = dummies("qwen3")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    trace = trace_step(request_for(config, TraceBatch((64,)), "levers.precision=fp32", "levers.checkpointing=none"))
    work = traced_work(trace)
    assert work is not None
    assert trace.written == sum(event.bytes for event in trace.events if event.kind == "alloc")
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).train()
    ids = torch.zeros(1, 64, dtype=torch.long)
    with Count() as count:
        made(input_ids=ids, labels=ids).loss.backward()
    assert trace.written == pytest.approx(count.written, rel=0.1)
    assert float(work.kernels) == pytest.approx(count.kernels, rel=0.15)
    assert float(work.elementwise_bytes) == pytest.approx(count.bytes, rel=0.25)
    assert traced_work(dataclasses.replace(trace, written=None)) is None
