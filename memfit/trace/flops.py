"""FLOPs of one operator call, by torch's own formulas where it has them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of `func`; 0 for what only moves or adds."""
    if id(func) in _NONE:
        return 0
    packet = func._overloadpacket
    places = _PRODUCTS.get(packet)
    if places is not None:
        # As torch's formulas, which take ten times as long to call.
        left, right = args[places].shape, args[places + 1].shape
        return int(2 * math.prod(left) * right[-1])
    own = _OWN.get(packet)
    if own is not None:
        return own(args, kwargs)
    if packet not in flop_registry:
        _NONE.add(id(func))
        return 0
    return int(flop_registry[packet](*args, **kwargs, out_val=out))


def add_flops(count: int) -> None:
    """A stand-in tells whoever traces it what the kernel multiplies: 2 for a multiply-add."""
    for mode in _get_current_dispatch_mode_stack():
        if hasattr(mode, "add_flops"):
            mode.add_flops(count)


def _sdpa(args: Any, kwargs: Any) -> int:
    """Two products for every query head: grouped heads are multiplied as often."""
    rows, heads, length, size = args[0].shape
    return int(2 * rows * heads * length * args[1].shape[2] * (size + args[2].shape[3]))


def _sdpa_backward(args: Any, kwargs: Any) -> int:
    """Five products: the weights again, and the gradients of values, weights, queries and keys."""
    _, query, key, value = args[:4]
    rows, heads, length, size = query.shape
    return int(2 * rows * heads * length * key.shape[2] * (3 * size + 2 * value.shape[3]))


def _flash(args: Any, kwargs: Any) -> int:
    """Two products of every sequence with itself; tensors are (rows, tokens, heads, size) or (tokens, heads, size)."""
    return 4 * args[0].shape[-2] * args[0].shape[-1] * _pairs(args[0], args[1], args[3])


def _flash_backward(args: Any, kwargs: Any) -> int:
    """Five products: the weights again, and the gradients of values, weights, queries and keys."""
    return 10 * args[1].shape[-2] * args[1].shape[-1] * _pairs(args[1], args[2], args[6])


def _pairs(query: torch.Tensor, key: torch.Tensor, starts: torch.Tensor | None) -> int:
    """Pairs of query and key that a kernel without a mask looks at, as torch's own formulas count them."""
    if starts is None:
        return query.shape[0] * query.shape[1] * key.shape[1]
    return sum(length * length for length in starts.diff().tolist())


def _triangular(args: Any, kwargs: Any) -> int:
    """n * n * m multiply-adds over 2, a multiply-add being 2, for a triangle of n x n and m right-hand sides."""
    left, right = args[0], args[1]
    return int(right.numel() * left.shape[-1])


# Operators known to count nothing, by identity: they live as long as torch does.
_NONE: set[int] = set()
# Products of matrices, with the place of the left one among the arguments.
_PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.addmm_: 1, aten.baddbmm: 1}
# torch counts the CUDA kernels of attention only; the CPU's has the same arguments in front.
_OWN = {
    aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
    aten._scaled_dot_product_flash_attention: _sdpa,
    aten._scaled_dot_product_flash_attention_backward: _sdpa_backward,
    aten._flash_attention_forward: _flash,
    aten._flash_attention_backward: _flash_backward,
    aten.linalg_solve_triangular: _triangular,
}
