"""physics.loss against the real loss: live storages as large as the logits, counted operation by operation."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.loss.loss_utils import ForCausalLMLoss

from memfit.physics.loss import loss_bytes

B, T, D, V = 2, 64, 8, 1000


class LiveBytes(TorchDispatchMode):
    """Bytes of storages of at least `floor` bytes that exist now, and the most that did."""

    def __init__(self, floor: int) -> None:
        super().__init__()
        self.floor, self.now, self.peak = floor, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or size < self.floor:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key, size)

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def old_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss as LLaMA's class of early 2024 wrote it out."""
    shifted = logits[..., :-1, :].contiguous().view(-1, V)
    return torch.nn.functional.cross_entropy(shifted, labels[..., 1:].contiguous().view(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("outputs_alive", [True, False])
@pytest.mark.parametrize("path", ["full-logits", "full-logits-2024"])
def test_the_real_loss_takes_what_is_forecast(dtype: torch.dtype, outputs_alive: bool, path: str) -> None:
    hidden_BTD = torch.randn(B, T, D, dtype=dtype, requires_grad=True)
    head_VD = torch.randn(V, D, dtype=dtype, requires_grad=True)
    labels_BT = torch.randint(0, V, (B, T))
    count = B * T * V
    with LiveBytes(count) as live:
        logits_BTV = hidden_BTD @ head_VD.t()
        if path == "full-logits":
            loss = ForCausalLMLoss(logits_BTV, labels_BT, vocab_size=V)
        else:
            logits_BTV = logits_BTV.float()
            loss = old_loss(logits_BTV, labels_BT)
        outputs = [logits_BTV]
        del logits_BTV
        forward_peak, after_forward = live.peak, live.now
        if not outputs_alive:
            outputs.clear()
        live.peak = live.now
        loss.backward()
    expected = loss_bytes(count, dtype.itemsize, outputs_alive, path)
    # The old path leaves out one position in T of everything but the kept logits; the new one is exact.
    slack = 0 if path == "full-logits" else count * 12 // T
    assert expected.forward_peak - slack <= forward_peak <= expected.forward_peak
    assert expected.after_forward - slack <= after_forward <= expected.after_forward
    assert expected.backward_peak - slack <= live.peak <= expected.backward_peak
