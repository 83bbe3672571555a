"""FLOPs of kernels that stand-ins stand for: by hand, and beside the plain path that computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.specs.trace import StepTrace
from memfit.trace import delta, fused
from memfit.trace.flops import flops_of
from memfit.trace.step import trace_step
from tests.unit.test_trace import dummy_request

Folder = Callable[[str], Path]


def test_one_chunk_by_hand() -> None:
    """64 tokens, one head, keys and values of 64: states of 64^3, squares of 64^3, as many as the kernels multiply."""
    cube = 64**3
    # k k' in 10 of 16 blocks, the inverse, w and u, w h and k' v, q h, q k', scores v
    assert delta.forward_flops(1, 64, 1, 64, 64) == 2 * (cube * 10 // 16 + 16 * 16**3 + 2 * cube + 2 * cube + 3 * cube)
    # w and u, w h, k' v | q k', scores do | k dh, q do, w dv | ds, do h, v dh, dv h, ds k, ds' q | the inverse: 9
    assert delta.backward_flops(1, 64, 1, 64, 64) == 2 * cube * (4 + 2 + 3 + 6 + 9)


@pytest.mark.parametrize("count", [delta.forward_flops, delta.backward_flops])
def test_chunks_are_whole_and_heads_and_rows_are_alike(count: Callable[..., int]) -> None:
    one = count(1, 64, 1, 32, 16)
    assert count(1, 65, 1, 32, 16) == count(2, 1, 1, 32, 16) == count(1, 64, 2, 32, 16) == 2 * one
    # Keys above a tile look at do and v once more.
    extra = delta.backward_flops(1, 64, 1, 256, 16) - 2 * delta.backward_flops(1, 64, 1, 128, 16)
    fixed = 2 * 64 * 64 * (4 * 16 + 2 * 64)  # what does not grow with the key: 1 + 1 + 2 products with values, C^3
    assert extra == -fixed


def flops(trace: StepTrace, phase: str) -> int:
    return sum(row.flops for row in trace.flops if row.phase == phase)


@pytest.mark.parametrize(("checkpointing", "again"), [("none", 0), ("full", 1)])
def test_a_traced_step_counts_them(
    dummies: Folder, monkeypatch: pytest.MonkeyPatch, checkpointing: str, again: int
) -> None:
    """The dummy's one linear-attention layer: 2 heads of 16, two rows of 90 tokens in two chunks each."""
    sets = ("levers.linear_attention=fla", "levers.precision=bf16-amp", f"levers.checkpointing={checkpointing}")
    request = dummy_request(dummies("minicpmv4_6"), *sets, device="gpu")
    whole = trace_step(request)
    monkeypatch.setattr(delta, "add_flops", lambda count: None)
    without = trace_step(request)
    forward, backward = (count(2, 90, 2, 16, 16) for count in (delta.forward_flops, delta.backward_flops))
    assert flops(whole, "forward") - flops(without, "forward") == forward
    assert flops(whole, "backward") - flops(without, "backward") == backward + again * forward
    assert whole.events == without.events


def test_the_reference_multiplies_about_as_much(dummies: Folder) -> None:
    """transformers' own chunked rule solves its triangle row by row: the same order of work."""
    sets = ("levers.precision=bf16-amp",)
    plain = trace_step(dummy_request(dummies("minicpmv4_6"), *sets, device="gpu"))
    fla = trace_step(dummy_request(dummies("minicpmv4_6"), *sets, "levers.linear_attention=fla", device="gpu"))
    rule = delta.forward_flops(2, 90, 2, 16, 16)
    reference = flops(plain, "forward") - (flops(fla, "forward") - rule)
    assert 0.5 < reference / rule < 2


class Counter(TorchDispatchMode):
    """What operators tell, and what stand-ins tell."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.told = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += flops_of(func, args, kwargs or {}, out)
        return out

    def add_flops(self, count: int) -> None:
        self.told += count


@pytest.mark.parametrize("autocast", [False, True])
def test_the_fused_loss_counts_three_products(autocast: bool) -> None:
    """Logits, the gradient of the hidden states and that of the head: 2 x tokens x hidden x vocabulary each."""
    hidden = torch.zeros(48, 16, dtype=torch.bfloat16 if autocast else torch.float32, requires_grad=True)
    weight = torch.zeros(64, 16, requires_grad=True)
    with Counter() as counter, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fused.liger_loss(hidden, weight, torch.zeros(48, dtype=torch.long))
    assert counter.operators + counter.told == 3 * 2 * 48 * 16 * 64
    assert counter.told == (2 * 48 * 16 * 64 if autocast else 0)
