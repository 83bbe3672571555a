"""FlashAttention's own package in the trace: one kernel for dense, packed and windowed rows, on its own layout.

transformers hands it tensors of (rows, tokens, heads, size); windows and packed samples go in one call with the bounds
of their sequences. torch ships the same kernel under `aten::_flash_attention_forward`, with its own derivative: what it
keeps is torch's word. Registered under a name of memfit's own through transformers' AttentionInterface.

Sources: transformers.modeling_flash_attention_utils:_flash_attention_forward, flash_attn.flash_attn_interface:
FlashAttnFunc and FlashAttnVarlenFunc (2.8), aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

aten = torch.ops.aten
# "flash" in the name is what transformers' models ask for before they pass the bounds of windows and packed samples.
NAME = "memfit_flash_attention_2"
PASSES = "memfit_flash_passes"


class _Bounds(NamedTuple):
    """Where the sequences of one long row begin and end, and the longest."""

    starts: torch.Tensor
    longest: int


def use_flash(model: Any) -> None:
    """Let a model that was made for sdpa call the stand-in: transformers makes none for a package that is not there."""
    AttentionInterface.register(NAME, flash_attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = NAME


@contextmanager
def attention_passes(model: Any) -> Iterator[None]:
    """Within, attention that is sdpa hands its queries on, windows in one call: for a look at shapes alone.

    Masks stay those of sdpa.
    """
    AttentionInterface.register(PASSES, _queries)
    AttentionMaskInterface.register(PASSES, sdpa_mask)
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = [(one, one._attn_implementation) for one in configs.values() if hasattr(one, "_attn_implementation")]
    try:
        for config, name in before:
            config._attn_implementation = PASSES if name == "sdpa" else name
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _queries(module: Any, query: torch.Tensor, *others: Any, **options: Any) -> tuple[torch.Tensor, None]:
    return query.transpose(1, 2), None


def flash_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """As transformers.integrations.flash_attention:flash_attention_forward. query: (B, N, T, H); key, value: B, K."""
    tensors = tuple(tensor.transpose(1, 2) for tensor in (query, key, value))
    wanted = get_target_dtype(query, module)
    if wanted is not None:
        tensors = tuple(tensor.to(wanted) for tensor in tensors)
    causal = options.get("is_causal")
    causal = bool(module.is_causal if causal is None else causal)
    rows, length = tensors[0].shape[:2]
    if attention_mask is not None:
        return _unpadded(tensors, attention_mask, causal, options), None
    bounds = _bounds(options, rows)
    if bounds is None:
        return _kernel(tensors, None, causal, options), None
    flat = tuple(tensor.reshape(-1, *tensor.shape[-2:]) for tensor in tensors)
    out = _kernel(flat, bounds, causal, options)
    return out.view(rows, length, *out.shape[-2:]), None


def _bounds(options: Any, rows: int) -> _Bounds | None:
    """Of windows as the model gives them, or of packed samples by their positions; None for one sequence a row."""
    starts = options.get("cu_seq_lens_q")
    if starts is not None and options.get("max_length_q") is not None:
        return _Bounds(starts, int(options["max_length_q"]))
    positions = options.get("position_ids")
    if positions is None or rows != 1 or positions.dim() != 2 or bool((positions.diff(dim=-1) == 1).all()):
        return None
    flat = positions.flatten()
    edges = torch.cat([(flat == 0).nonzero().flatten(), torch.tensor([len(flat)])]).to(torch.int32)
    return _Bounds(edges, int(edges.diff().max()))


def _unpadded(tensors: Any, mask: torch.Tensor, causal: bool, options: Any) -> torch.Tensor:
    """Padding is left out before the kernel and put back after it."""
    rows, length = tensors[0].shape[:2]
    lengths = mask.sum(-1, dtype=torch.int32)
    places = mask.flatten().nonzero().flatten()
    starts = functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    flat = tuple(tensor.reshape(-1, *tensor.shape[-2:]).index_select(0, places) for tensor in tensors)
    out = _kernel(flat, _Bounds(starts, int(lengths.max())), causal, options)
    padded = out.new_zeros(rows * length, *out.shape[1:]).index_copy(0, places, out)
    return padded.view(rows, length, *out.shape[1:])


def _kernel(tensors: Any, bounds: _Bounds | None, causal: bool, options: Any) -> torch.Tensor:
    """Heads that are no multiple of 8 are padded, and the result is cut (FlashAttnFunc.forward)."""
    query, key, _ = tensors
    size, scale = query.shape[-1], options.get("scaling")
    if size % 8:
        tensors = tuple(functional.pad(tensor, (0, 8 - size % 8)) for tensor in tensors)
    longest = (bounds.longest, bounds.longest) if bounds else (query.shape[1], key.shape[1])
    starts = bounds.starts if bounds else None
    out: torch.Tensor = aten._flash_attention_forward(
        *tensors,
        starts,
        starts,
        *longest,
        float(options.get("dropout") or 0.0),
        causal,
        False,
        scale=float(size**-0.5) if scale is None else scale,
    )[0]
    return out[..., :size] if size % 8 else out


def workspace_bytes(args: Any) -> int:
    """Bytes that backward takes beside dq, dk and dv: row sums and the fp32 sum of dq; with grouped heads dk and dv for
    every query head. Each sequence of a long row is given 128 rows more instead of being rounded up to 128.
    (flash_api.cpp: mha_bwd, mha_varlen_bwd.)
    """
    query, key, starts = args[1], args[2], args[6]
    heads, size = query.shape[-2:]
    wide = _rounded(size, 32 if size <= 128 else 64)
    count = query.numel() // (heads * size)
    if starts is None:
        tokens = query.shape[0] * _rounded(query.shape[1], 128)
    else:
        tokens = count + 128 * (starts.numel() - 1)
    total = 4 * tokens * heads + 4 * tokens * heads * wide
    if key.shape[-2] != heads:
        total += 2 * key.numel() // key.shape[-2] * heads * key.element_size()
    return int(total)


def _rounded(number: int, unit: int) -> int:
    return -(-number // unit) * unit
