"""What DeepSpeed's ZeRO-3 does to every model: `torch.nn.functional.linear` is a function of its own.

It keeps the input of every Linear for backward, of frozen ones too, and adds the bias in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ROW = "zero3-linear"


class _Linear(torch.autograd.Function):
    """Source: deepspeed.runtime.zero.linear:LinearFunctionForZeroStage3 (0.19.8), without autocast and gathering."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        if x.dim() == 2 and bias is not None:
            return torch.addmm(bias, x, weight.t())
        out = x.matmul(weight.t())
        if bias is not None:
            out += bias
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias = ctx.saved_tensors
        (grad,) = grads
        flat = grad.reshape(-1, grad.shape[-1]) if grad.dim() > 2 else grad
        found: list[torch.Tensor | None] = [None, None, None]
        if ctx.needs_input_grad[0]:
            found[0] = grad.matmul(weight)
        if ctx.needs_input_grad[1]:
            found[1] = flat.t().matmul(x.reshape(-1, x.shape[-1]))
        if bias is not None and ctx.needs_input_grad[2]:
            found[2] = flat.sum(0)
        return tuple(found)


class Zero3Linear(TorchFunctionMode):
    """Runs every `linear` as ZeRO-3 does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out: torch.Tensor = _Linear.apply(input, weight, bias)
    return out
