"""What the CPU's own kernels take for themselves: they matter where a trace is compared with a run on this machine."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten
# Norms whose CPU kernels want weights of the input's dtype or in fp32: operator -> the place of the weight.
_NORMS = {aten.native_layer_norm.default: 2, aten.native_group_norm.default: 1}
_PRODUCTS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2)}
_POINTWISE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
_IN_PLACE = {aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.div_.Tensor}
LOW = (torch.bfloat16, torch.float16)
_PAGE = 128  # oneDNN's scratchpad: rounded up to 128 bytes, and 128 more


class MixedNorm(Exception):
    """A norm that this CPU build of torch does not run: 16-bit weights and an input of another dtype.

    Source: ATen/native/mixed_data_type.h, check_mixed_data_type ("mixed dtype (CPU): expect parameter to have scalar
    type of Float"). Fake tensors pass where real ones do not; CUDA's autocast runs norms in fp32 instead.
    """

    def __init__(self, weight: torch.Tensor, given: torch.dtype) -> None:
        super().__init__(f"{weight.dtype} weights, {given} input")
        self.weight, self.given = weight, given


def workspace_bytes(func: Any, args: Any) -> int:
    """Bytes beside the results of one operator. Raises MixedNorm for one that a real CPU refuses.

    A 16-bit matrix product sums in fp32 where the CPU has no instruction for it: one number for each of its result
    (oneDNN's scratchpad; measured with torch.profiler, torch 2.13, AVX-512 without bf16). Operands of two dtypes are
    copied to the common one before they are added or multiplied, and a result in place is made in it (ATen
    TensorIterator.cpp: TensorIteratorBase::compute_types; CUDA casts inside the kernel).
    """
    if func in _POINTWISE or func in _IN_PLACE:
        return _promoted(args, func in _IN_PLACE)
    if func in _NORMS:
        _refuse_mixed(args[0], args[_NORMS[func]])
        return 0
    places = _PRODUCTS.get(func)
    if places is not None:
        left, right = args[places[0]], args[places[1]]
        if left.dtype in LOW and not _has_native_bf16():
            return -(-4 * left.shape[0] * right.shape[1] // _PAGE) * _PAGE + _PAGE
    return 0


def _refuse_mixed(given: torch.Tensor, weight: torch.Tensor | None) -> None:
    if weight is not None and weight.dtype in LOW and weight.dtype != given.dtype:
        raise MixedNorm(weight, given.dtype)


def _promoted(args: Any, in_place: bool) -> int:
    """Bytes of the copies that two operands need to come to their common dtype."""
    left, right = args[0], args[1]
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor) or left.dtype == right.dtype:
        return 0
    common = torch.result_type(left, right)
    copies = [tensor for tensor in (left, right) if tensor.dtype != common]
    if in_place and left.dtype != common:
        copies.append(left)
    return sum(tensor.numel() for tensor in copies) * common.itemsize


def _has_native_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
