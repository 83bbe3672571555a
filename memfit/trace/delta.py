"""The gated delta rule of flash-linear-attention in the trace: what it allocates, keeps and frees.

Values mean nothing here. Source: fla.ops.gated_delta_rule.chunk:ChunkGatedDeltaRuleFunction (fla-core 0.6.0) and what
it calls; every allocation below stands there under the same name. The convolution before it belongs to another package
(causal-conv1d) and stays torch's own. FLOPs are those of the kernels' products (tl.dot), by formula: `forward_flops`,
`backward_flops`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.models.qwen3_5 import modeling_qwen3_5 as upstream

from memfit.trace.flops import add_flops

CHUNK = 64  # chunk_gated_delta_rule: kwargs.pop("chunk_size", 64)
BLOCK = 16  # chunk_gated_delta_rule_fwd_intra: BC, the sub-blocks of a chunk
TILE = 128  # chunk_bwd_dqkwg: CONST_TILING on A100 and newer with 16-bit tensors


class _GatedDeltaRule(torch.autograd.Function):
    """inputs q, k: (B, T, H, K); v: (B, T, J, V) with J a multiple of H heads; g, beta: (B, T, J)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        q, k, v, g, beta = (tensor.contiguous() for tensor in inputs)  # input_guard
        q, q_rstd = _l2norm(q)
        k, k_rstd = _l2norm(k)
        g = torch.empty_like(g, dtype=torch.float32)  # chunk_local_cumsum
        A = k.new_zeros(*beta.shape, CHUNK)
        w, u = _recompute_w_u(k, v, beta)
        h, v_new = _states(k, u)
        o = torch.empty_like(v_new)
        rows, length, heads, value = v.shape
        add_flops(forward_flops(rows, length, heads, k.shape[-1], value))
        ctx.save_for_backward(q, q_rstd, k, k_rstd, v, g, beta, A)
        del w, u, h, v_new
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, _, k, _, v, g, beta, _ = ctx.saved_tensors
        dq, dk, dv, db, dg = _backward((q, k, v, g, beta), grads[0].contiguous())
        rows, length, heads, value = v.shape
        add_flops(backward_flops(rows, length, heads, k.shape[-1], value))
        dq = torch.empty_like(q)  # l2norm_bwd
        dk = torch.empty_like(k)
        return dq, dk, dv, dg, db


def forward_flops(rows: int, length: int, heads: int, key: int, value: int) -> int:
    """Products of chunk_gated_delta_rule_fwd, a multiply-add being 2; `heads` are the values' heads.

    Of every chunk of C tokens, the last one whole: k k' in the blocks on and below the diagonal, 16 small products that
    invert it (chunk_fwd.py: chunk_gated_delta_rule_fwd_kkt_solve_kernel), w and u (wy_fast.py:
    recompute_w_u_fwd_kernel), w h and k' v (chunk_delta_h.py: chunk_gated_delta_rule_fwd_kernel_h_blockdim64), q h,
    q k' and their product with v (chunk_o.py: chunk_fwd_kernel_o).
    """
    blocks = CHUNK // BLOCK
    pairs = BLOCK * BLOCK * (blocks * (blocks + 1) // 2) * key
    inverse = 16 * BLOCK**3
    square, state = CHUNK * CHUNK, CHUNK * key * value
    return 2 * _chunks(rows, length, heads) * (pairs + inverse + 2 * square * (key + value) + 3 * state)


def backward_flops(rows: int, length: int, heads: int, key: int, value: int) -> int:
    """Products of chunk_gated_delta_rule_bwd, counted as those of `forward_flops`.

    w, u, h and v again; dv of the chunk (chunk_o.py: chunk_bwd_kernel_dv_local); dh, with dv and two more
    (chunk_delta_h.py: chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64); ds for every tile of the key, dq, dk, dw from
    states and two from ds (chunk_o.py: chunk_bwd_kernel_dqkwg); five products with keys, two with values and two of the
    chunk with itself (wy_fast.py: prepare_wy_repr_bwd_kernel).
    """
    square, state = CHUNK * CHUNK, CHUNK * key * value
    again = square * (key + value) + 2 * state
    local = square * (key + value)
    from_states = (3 + 3) * state
    from_scores = square * (_tiles(key) * value + 2 * key)
    inverse = square * (5 * key + 2 * value + 2 * CHUNK)
    return 2 * _chunks(rows, length, heads) * (again + local + from_states + from_scores + inverse)


def _chunks(rows: int, length: int, heads: int) -> int:
    return rows * heads * math.ceil(length / CHUNK)


def _tiles(size: int) -> int:
    """Tiles of the key's size in chunk_bwd_dqkwg."""
    return math.ceil(size / min(max(1 << (size - 1).bit_length(), 16), TILE))


def _backward(inputs: Any, do: Any) -> Any:
    """chunk_gated_delta_rule_bwd: its locals live until it returns."""
    q, k, v, g, beta = inputs
    w, u = _recompute_w_u(k, v, beta)
    h, v_new = _states(k, u)
    dv = torch.empty_like(do)  # chunk_bwd_dv_local
    dh, dv = torch.empty_like(h), torch.empty_like(dv)  # chunk_gated_delta_rule_bwd_dhu
    dq, dk, dw, dg = _dqkwg(q, k, g, w)
    dk2, dv = _per_value_head(k, beta), torch.empty_like(v)  # prepare_wy_repr_bwd
    dg2, db = torch.empty_like(g), torch.empty_like(beta)
    dk2 = _grouped(dk2, k)
    dk.add_(dk2)
    dg.add_(dg2)
    dg = torch.empty_like(dg)  # chunk_local_cumsum, reverse
    del w, u, h, v_new, dh, dw
    return dq, dk, dv, db, dg


def _dqkwg(q: Any, k: Any, g: Any, w: Any) -> Any:
    """chunk_bwd_dqkwg: one dg for every tile of the key's size, then their sum."""
    dq, dk = _per_value_head(q, g), _per_value_head(k, g)
    dg = g.new_empty(_tiles(k.shape[-1]), *g.shape)
    dw = torch.empty_like(w)
    dq, dk = _grouped(dq, q), _grouped(dk, k)
    return dq, dk, dw, dg.sum(0)


def _l2norm(x: Any) -> Any:
    return torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _recompute_w_u(k: Any, v: Any, beta: Any) -> Any:
    return _per_value_head(k, beta), torch.empty_like(v)


def _states(k: Any, u: Any) -> Any:
    """chunk_gated_delta_rule_fwd_h: the state before every chunk, in the dtype of k, and the corrected values."""
    rows, length, heads, size = u.shape
    return k.new_empty(rows, math.ceil(length / CHUNK), heads, k.shape[-1], size), torch.empty_like(u)


def _per_value_head(x: Any, heads: Any) -> torch.Tensor:
    """A key-like tensor with as many heads as there are values' heads."""
    return torch.empty(*x.shape[:2], heads.shape[2], x.shape[-1], dtype=x.dtype, device=x.device)


def _grouped(x: Any, like: Any) -> Any:
    """Summed over the value heads that share a key head, where they do."""
    if x.shape == like.shape:
        return x
    rows, length, heads, size = like.shape
    return x.view(rows, length, heads, x.shape[2] // heads, size).sum(3)


class FlaDeltaNet(nn.Module):
    """A Qwen3.5 linear-attention layer that calls the fused rule; it holds the layer's own modules and parameters."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        self.dt_bias, self.A_log = layer.dt_bias, layer.A_log
        self.sizes = [layer.key_dim, layer.key_dim, layer.value_dim]
        self.key_size, self.value_size, self.activation = layer.head_k_dim, layer.head_v_dim, layer.activation

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> torch.Tensor:
        """As modeling_qwen3_5:Qwen3_5GatedDeltaNet.forward does without a cache."""
        hidden = upstream.apply_mask_to_padding_states(hidden_states, attention_mask)
        rows, length, _ = hidden.shape
        mixed = self.in_proj_qkv(hidden).transpose(1, 2)
        z = self.in_proj_z(hidden).reshape(rows, length, -1, self.value_size)
        b, a = self.in_proj_b(hidden), self.in_proj_a(hidden)
        conv: Any = self.conv1d
        mixed = upstream.causal_conv1d_fn(mixed, conv.weight.squeeze(1), conv.bias, activation=self.activation)
        query, key, value = torch.split(mixed.transpose(1, 2), self.sizes, dim=-1)
        query, key = (tensor.reshape(rows, length, -1, self.key_size) for tensor in (query, key))
        value = value.reshape(rows, length, -1, self.value_size)
        gate = -self.A_log.float().exp() * functional.softplus(a.float() + self.dt_bias)
        out = _GatedDeltaRule.apply(query, key, value, gate, b.sigmoid())
        out = self.norm(out.reshape(-1, self.value_size), z.reshape(-1, self.value_size))
        result: torch.Tensor = self.out_proj(out.reshape(rows, length, -1))
        return result


def use_fla(model: nn.Module) -> int:
    """Put stand-ins for the model's linear-attention layers; returns how many there were."""
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, upstream.Qwen3_5GatedDeltaNet)
    ]
    for name, module in layers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FlaDeltaNet(module))
    return len(layers)
