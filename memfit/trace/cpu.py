"""What the CPU's own kernels take for themselves: they matter where a trace is compared with a run on this machine."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2)}
LOW = (torch.bfloat16, torch.float16)
_PAGE = 128  # oneDNN's scratchpad: rounded up to 128 bytes, and 128 more


def workspace_bytes(func: Any, args: Any) -> int:
    """Bytes beside the results of one operator.

    A 16-bit matrix product sums in fp32 where the CPU has no instruction for it: one number for each of its result
    (oneDNN's scratchpad; measured with torch.profiler, torch 2.13, AVX-512 without bf16).
    """
    places = _PRODUCTS.get(func)
    if places is not None:
        left, right = args[places[0]], args[places[1]]
        if left.dtype in LOW and not _has_native_bf16():
            return -(-4 * left.shape[0] * right.shape[1] // _PAGE) * _PAGE + _PAGE
    return 0


def _has_native_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
