"""FLOPs of one operator call, by torch's own formulas where it has them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of `func`; 0 for what only moves or adds."""
    packet = func._overloadpacket
    own = _OWN.get(packet)
    if own is not None:
        return own(args, kwargs)
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def _sdpa(args: Any, kwargs: Any) -> int:
    return int(sdpa_flop_count(args[0].shape, _expanded(args[1], args[0]), _expanded(args[2], args[0])))


def _sdpa_backward(args: Any, kwargs: Any) -> int:
    grad, query, key, value = args[:4]
    return int(sdpa_backward_flop_count(grad.shape, query.shape, _expanded(key, query), _expanded(value, query)))


def _expanded(key: torch.Tensor, query: torch.Tensor) -> Any:
    """The shape of keys or values with a head for every query head: grouped heads are multiplied as often."""
    return (key.shape[0], query.shape[1], *key.shape[2:])


def _triangular(args: Any, kwargs: Any) -> int:
    """n * n * m multiply-adds over 2, a multiply-add being 2, for a triangle of n x n and m right-hand sides."""
    left, right = args[0], args[1]
    return int(right.numel() * left.shape[-1])


# torch counts the CUDA kernels of attention only; the CPU's has the same arguments in front.
_OWN = {
    aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
    aten.linalg_solve_triangular: _triangular,
}
