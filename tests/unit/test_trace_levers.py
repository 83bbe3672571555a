"""Checkpointing, its selective form and offload: traced against real steps, and by hand where a GPU would differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import memfit
from benchmarks.trace_against_profiler import measure, request_for
from memfit.build.build import Built, Materials, build
from memfit.build.checkpointing import SAVED
from memfit.errors import UserError
from memfit.physics.pinned import pinned_bytes
from memfit.specs.recipe import Recipe
from memfit.specs.trace import StepTrace, TraceBatch
from memfit.testing.models import KINDS
from memfit.trace.prepare import prepare
from memfit.trace.step import trace_step
from tests.unit.conftest import VISION_KINDS
from tests.unit.test_trace import assert_equal, dummy_request

Folder = Callable[[str], Path]
Make = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The CPU's flash attention takes for each thread (32 x 90 scores + 2 x 32 sums + 32 x 16 results) x 4 B, which a trace
# has not (ATen/native/cpu/FlashAttentionKernel.cpp: cpu_flash_attention, `size_per_thread`).
FLASH_SCRATCH = 4 * (32 * 90 + 2 * 32 + 32 * 16)
LEVERS = {
    "selective": ("levers.checkpointing=selective",),
    "selective, lora, amp": ("levers.checkpointing=selective", "method=lora", "levers.precision=bf16-amp"),
    "vision only": ("levers.checkpointing={vision: full, language: none}",),
    "each its own": ("levers.checkpointing={vision: every-2, language: selective}",),
    "offloaded": ("levers.checkpointing=full", "levers.activation_offload=true"),
    "chunked": ("levers.loss=chunked", "levers.checkpointing=full"),
}


@pytest.mark.parametrize("kind", ["llama", "qwen2_5_vl", "minicpmv4_6"])
@pytest.mark.parametrize("lever", LEVERS)
def test_levers_equal_a_real_step(dummies: Folder, kind: str, lever: str) -> None:
    if kind == "llama" and "vision" in str(LEVERS[lever]):
        pytest.skip("a text model has no vision part")
    request = dummy_request(dummies(kind), *LEVERS[lever])
    # Scratchpads of 16-bit bmm.
    assert_equal(trace_step(request), request, FLASH_SCRATCH + 1024)


@pytest.mark.parametrize("kind", KINDS)
def test_selective_keeps_more_than_full_and_less_than_none(dummies: Folder, kind: str) -> None:
    saved = {}
    for mode in ("none", "selective", "full"):
        trace = trace_step(dummy_request(dummies(kind), f"levers.checkpointing={mode}"))
        saved[mode] = sum(row.bytes for row in trace.saved if row.part == "language")
    assert saved["full"] < saved["selective"] < saved["none"]


def test_selective_keeps_products_and_attention_by_hand(dummies: Folder) -> None:
    """Of one llama layer: q, k, v, attention's result and logsumexp, o, gate, up, down; its result, the generator."""
    folder = dummies("llama")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokens = 80
    trace = trace_step(dummy_request(folder, "levers.checkpointing=selective", rows=(tokens,)))
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    narrow = config["num_key_value_heads"] * config["head_dim"]
    products = 4 * tokens * (hidden + 2 * narrow + hidden + 2 * ffn + hidden)
    attention = 4 * tokens * (hidden + config["num_attention_heads"])
    first, second = (row.bytes for row in trace.saved if row.block is not None)
    result = 4 * tokens * hidden  # the next layer's input, or what the final norm keeps
    state = torch.get_rng_state().numel()  # that a CPU layer's second forward draws the same numbers
    assert first == second == products + attention + result + state
    assert {"aten::mm", "aten::addmm"} <= SAVED


@pytest.mark.parametrize("lever", ["levers.checkpointing=selective", "levers.activation_offload=true"])
@pytest.mark.parametrize("kind", VISION_KINDS)
def test_gradients_are_those_without_checkpointing(recipe: Make, kind: str, lever: str) -> None:
    from tests.unit.test_build import batch_of, loss_of, samples_of

    found = {}
    for name, sets in {"plain": (), "lever": ("levers.checkpointing=full", lever)}.items():
        wanted = recipe(kind, *sets)
        built = built_from(wanted)
        built.model.train()
        loss_of(built, batch_of(built, samples_of(wanted), 0, 1)).backward()
        found[name] = {n: p.grad for n, p in built.model.named_parameters() if p.grad is not None}
    assert found["plain"].keys() == found["lever"].keys()
    for name, gradient in found["plain"].items():
        torch.testing.assert_close(found["lever"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def built_from(recipe: Recipe) -> Built:
    found = prepare(recipe)
    return build(found.plan(), Materials(found.source, found.family, found.profile))


def test_modules_that_cannot_checkpoint_are_not_counted(recipe: Make) -> None:
    """Of MiniCPM-V 4.6 the window merger and the merger compute once, whatever the mode."""
    built = built_from(recipe("minicpmv4_6", "levers.checkpointing=full"))
    assert set(built.checkpointed) == {"vision", "language"}
    assert sum(built.checkpointed.values()) == 3 + 2


def gpu_trace(config: dict[str, Any], rows: tuple[int, ...], *sets: str, whole: bool = False) -> StepTrace:
    return trace_step(request_for(config, TraceBatch(rows), *sets, device="gpu"), whole)


@pytest.mark.parametrize("whole", [False, True])
def test_offloaded_inputs_leave_the_gpu_and_are_rounded_on_the_host(whole: bool) -> None:
    text = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = {"model_type": "llama", **text, "num_key_value_heads": 4, "head_dim": 24, "vocab_size": 300}
    sets = ("levers.checkpointing=full", "levers.precision=pure-bf16")
    kept = gpu_trace(config, (70,), *sets, whole=whole)
    away = gpu_trace(config, (70,), *sets, "levers.activation_offload=true", whole=whole)
    one = 2 * 70 * 96
    assert pinned_bytes(one) == 16384 > one
    assert (kept.pinned, away.pinned) == (0, 6 * 16384)
    # The last layer's result feeds the final norm, which keeps it; the first one's input is the embedding's.
    assert kept.saved_bytes - away.saved_bytes == 6 * one
    every = gpu_trace(config, (70,), *sets[1:], "levers.checkpointing=every-2", "levers.activation_offload=true")
    assert every.pinned == 3 * 16384


def test_what_comes_back_is_new_memory_of_the_backward_pass() -> None:
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = {"model_type": "llama", **text, "num_key_value_heads": 4, "vocab_size": 100}
    sets = ("levers.checkpointing=full", "levers.precision=pure-bf16", "levers.activation_offload=true")
    trace = gpu_trace(config, (50,), *sets)
    back = [event for event in trace.events if event.op == "aten::_to_copy" and event.phase == "backward"]
    assert 2 * 50 * 64 in [event.bytes for event in back]
    assert all(event.kind in ("alloc", "free", "gradient", "phase") for event in trace.events)


def test_offload_without_checkpointing_is_refused(dummies: Folder) -> None:
    with pytest.raises(UserError, match="moves what checkpointed layers keep"):
        dummy_request(dummies("llama"), "levers.activation_offload=true")


def test_offload_on_the_cpu_is_what_really_happens(dummies: Folder) -> None:
    request = dummy_request(dummies("qwen3"), "levers.checkpointing=full", "levers.activation_offload=true")
    trace, real = trace_step(request), measure(request)
    assert trace.pinned == 0
    assert abs(trace.saved_bytes - real.held) <= 64


def test_a_forecast_names_what_waits_on_the_host(dummies: Folder) -> None:
    sets = ["hardware.gpus=1xRTX4090", "levers.checkpointing=full"]
    plain, away = (
        memfit.estimate(None, sets=[*sets, f"levers.activation_offload={value}"], model=str(dummies("llama")))
        for value in ("false", "true")
    )
    assert away.trace is not None
    terms = {term.id: term for term in away.ledger.terms}
    assert terms["host.pinned_activations"].bytes == away.trace.pinned > 0
    assert terms["host.pinned_activations"].place == "host"
    assert "host.pinned_activations" not in {term.id for term in plain.ledger.terms}
    assert plain.node is not None
    assert away.node is not None
    assert away.node.pinned_bytes - plain.node.pinned_bytes == away.trace.pinned
