"""The substitution rows: what a CUDA device does otherwise than the CPU that the fakes pretend to be.

`CudaKernels` is a function mode: it sees torch's functions before autograd and autocast do, and calls the operators
that a CUDA tensor would reach. Those bring their own derivative formulas, so what they save is upstream's word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from memfit.trace import flash

aten = torch.ops.aten
_FLASH_PACKAGE_BACKWARD = aten._flash_attention_backward.default
_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward.default


@dataclass(frozen=True)
class Substitution:
    """One way in which the traced device differs. `source` is upstream's place; `verified` how it was checked."""

    name: str
    what: str
    source: str
    verified: str


ROWS: dict[str, Substitution] = {
    row.name: row
    for row in (
        Substitution(
            "autocast-fp32",
            "under autocast CUDA computes more functions in fp32 than the CPU does (layer_norm, softmax, exp, sum ...)",
            "aten/src/ATen/autocast_mode.h: AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE",
            "names against the AutocastCUDA and AutocastCPU registrations of the installed torch",
        ),
        Substitution(
            "dropout-mask",
            "dropout keeps a mask of 1 byte an element, not noise in the input's dtype",
            "aten/src/ATen/native/Dropout.cpp: is_fused_kernel_acceptable, native_dropout",
            "derivative of aten::native_dropout",
        ),
        Substitution(
            "sdpa-flash",
            "16-bit attention without a mask: keeps q, k, v (grouped heads not expanded), out and fp32 logsumexp",
            "aten/src/ATen/native/transformers/cuda/sdp_utils.cpp: use_flash_attention; flash_attn/flash_api.cpp",
            "derivative of aten::_scaled_dot_product_flash_attention",
        ),
        Substitution(
            "sdpa-efficient",
            "attention with a mask, or in fp32: also keeps the mask in the dtype of q, its rows padded to 16",
            "aten/src/ATen/native/transformers/attention.cpp: preprocess_mask; cuda/sdp_utils.cpp: use_mem_efficient",
            "derivative of aten::_scaled_dot_product_efficient_attention",
        ),
        Substitution(
            "sdpa-math",
            "grouped heads that no fused kernel takes (fp32): the whole matrix of weights",
            "aten/src/ATen/native/transformers/cuda/sdp_utils.cpp: check_batch_size_and_num_heads_dense",
            "cited, not measured",
        ),
        Substitution(
            "bnb-4bit",
            "a 4-bit Linear unpacks its weight in forward and again in backward, and keeps no input",
            "bitsandbytes/autograd/_functions.py: MatMul4Bit (from 0.43.2); peft/tuners/lora/bnb.py: Linear4bit",
            "memfit.trace.fourbit against bitsandbytes 0.50.2 and PEFT 0.21.2 on a CPU, with and without DoRA, within "
            "300 bytes (tests/unit/test_trace_dora_fourbit.py, where bitsandbytes is installed); no GPU has run it",
        ),
        Substitution(
            "liger-loss",
            "the loss keeps the gradients of hidden states and head, made in forward over chunks of logits",
            "liger_kernel/ops/fused_linear_cross_entropy.py (0.8.5): fused_linear_cross_entropy_forward",
            "memfit.trace.fused against that source, by hand; not measured",
        ),
        Substitution(
            "flash-package",
            "FlashAttention's own package: windows and packed samples in one call with the bounds of their sequences",
            "transformers/modeling_flash_attention_utils.py; flash_attn/flash_attn_interface.py (2.8)",
            "derivative of aten::_flash_attention_forward, the same kernel in torch; memfit.trace.flash",
        ),
        Substitution(
            "fla-delta-rule",
            "the gated delta rule keeps q, k (normalised), v, gate sums, beta and 64 numbers a token and value head",
            "fla/ops/gated_delta_rule/chunk.py (fla-core 0.6.0): ChunkGatedDeltaRuleFunction",
            "memfit.trace.delta against that source, by hand; not measured; FLOPs of its products by formula",
        ),
        Substitution(
            "zero3-linear",
            "every Linear keeps its input for backward, a frozen one too, and adds its bias in place; CPU ranks too",
            "deepspeed/runtime/zero/linear.py (0.19.8): LinearFunctionForZeroStage3",
            "events against those of that function, in a test; two ranks measured (docs/measured/accuracy_cpu.md)",
        ),
    )
}

# Functions that CUDA's autocast runs in fp32 and the CPU's leaves alone, by the name of the function or method.
UPCAST = frozenset(
    {
        *("layer_norm", "native_layer_norm", "group_norm", "rms_norm", "exp", "expm1", "log", "log10", "log2"),
        *("log1p", "pow", "rsqrt", "reciprocal", "softplus", "logsumexp", "cosine_similarity", "acos", "asin"),
        *("cosh", "sinh", "tan", "erfinv", "dist", "pdist", "renorm", "linalg_vector_norm"),
    }
)
# These get dtype=float32 where the caller names none: the input stays as it is, the result is fp32.
FP32_RESULT = frozenset({"softmax", "log_softmax", "cumsum", "cumprod", "sum"})
# torch.linalg.norm of a matrix's rows, as DoRA takes it, is linalg_vector_norm below.
_OPERATORS = {"__pow__": "pow", "__rpow__": "pow", "linalg_norm": "linalg_vector_norm"}
LOW = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256  # sdp_utils.cpp: check_head_dim_size_flash
MASK_ALIGNMENT = 16  # attention.cpp: preprocess_mask, pad_bias<16>


class CudaKernels(TorchFunctionMode):
    """Functions as a CUDA device runs them. `used` gathers the names of the rows that came into play."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()
        self._handlers: Mapping[str, Callable[..., Any]] = {
            "scaled_dot_product_attention": self._attention,
            "dropout": self._dropout,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = _OPERATORS.get(name, name)
        handler = self._handlers.get(name)
        if handler is not None:
            return handler(func, *args, **kwargs)
        if (name in UPCAST or name in FP32_RESULT) and torch.is_autocast_enabled("cpu"):
            return self._upcast(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _upcast(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if not any(_is_low(value) for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        self.used.add("autocast-fp32")
        if name in FP32_RESULT:
            return func(*args, **({"dtype": torch.float32} | kwargs) if kwargs.get("dtype") is None else kwargs)
        return func(*[_wide(value) for value in args], **{key: _wide(value) for key, value in kwargs.items()})

    def _dropout(
        self, func: Any, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or not 0 < p < 1 or inplace:
            return (
                func(input, p, training, inplace) if func is torch.nn.functional.dropout else func(input, p, training)
            )
        self.used.add("dropout-mask")
        return torch.native_dropout(input, p, True)[0]

    def _attention(self, func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The kernel that sdp_utils.cpp would choose."""
        call = _Attention(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):
            call = call.narrowed(torch.get_autocast_dtype("cpu"))
        query = call.query
        if query.dtype in LOW and call.attn_mask is None and query.shape[-1] <= LARGEST_HEAD:
            self.used.add("sdpa-flash")
            return _flash(call)
        if call.key.shape[1] != query.shape[1]:
            self.used.add("sdpa-math")
            return _math(call)
        self.used.add("sdpa-efficient")
        return _efficient(call)


@dataclass(frozen=True)
class _Attention:
    """The arguments of scaled_dot_product_attention. query: (B, N, T, H); key, value: (B, K, S, H)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def factor(self) -> float:
        return float(self.query.shape[-1] ** -0.5) if self.scale is None else self.scale

    def narrowed(self, dtype: torch.dtype) -> _Attention:
        """As autocast hands them on."""
        mask = self.attn_mask
        return replace(
            self,
            query=self.query.to(dtype),
            key=self.key.to(dtype),
            value=self.value.to(dtype),
            attn_mask=mask.to(dtype) if mask is not None and mask.is_floating_point() else mask,
        )


def _flash(call: _Attention) -> torch.Tensor:
    """Heads that are no multiple of 8 are padded, and the result is cut (attention.cpp: pad_last_dim<8>)."""
    size, tensors = call.query.shape[-1], (call.query, call.key, call.value)
    if size % 8:
        tensors = tuple(torch.nn.functional.pad(t, (0, 8 - size % 8)) for t in tensors)
    out = aten._scaled_dot_product_flash_attention(*tensors, call.dropout_p, call.is_causal, False, scale=call.factor)[
        0
    ]
    return out[..., :size] if size % 8 else out


def _efficient(call: _Attention) -> torch.Tensor:
    tensors = (call.query, call.key, call.value)
    bias = None if call.attn_mask is None else _bias(call.attn_mask, call.query, call.key)
    saves = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return aten._scaled_dot_product_efficient_attention(
        *tensors, bias, saves, call.dropout_p, call.is_causal, scale=call.factor
    )[0]


def _math(call: _Attention) -> torch.Tensor:
    return aten._scaled_dot_product_attention_math(
        call.query,
        call.key,
        call.value,
        call.attn_mask,
        call.dropout_p,
        call.is_causal,
        scale=call.scale,
        enable_gqa=call.enable_gqa,
    )[0]


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The mask as the efficient kernel takes it: in the dtype of q, rows padded to 16, spread over the heads."""
    if mask.dtype == torch.bool:
        zero, low = (torch.full((), number, dtype=query.dtype) for number in (0.0, float("-inf")))
        mask = torch.where(mask, zero, low)
    length = key.shape[2]
    if length % MASK_ALIGNMENT:
        mask = torch.nn.functional.pad(mask, (0, MASK_ALIGNMENT - length % MASK_ALIGNMENT))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], length)


def _is_low(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in LOW


def _wide(value: Any) -> Any:
    return value.float() if _is_low(value) else value


def _rounded(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def workspace_bytes(func: Any, args: Any) -> int:
    """Bytes that a CUDA kernel takes for itself while it runs, beyond its results.

    Flash attention's backward (flash_api.cpp: mha_bwd): the row sums and the fp32 sum of dq, both with the length
    rounded up to 128 and heads to 32 (64 above 128); with grouped heads dk and dv for every query head.
    """
    if func is _FLASH_PACKAGE_BACKWARD:
        return flash.workspace_bytes(args)
    if func is not _FLASH_BACKWARD:
        return 0
    query, key = args[1], args[2]
    rows, heads, length, size = query.shape
    long, wide = _rounded(length, 128), _rounded(size, 32 if size <= 128 else 64)
    total = 4 * rows * heads * long + 4 * rows * long * heads * wide
    if key.shape[1] != heads:
        total += 2 * rows * key.shape[2] * heads * size * key.element_size()
    return total
