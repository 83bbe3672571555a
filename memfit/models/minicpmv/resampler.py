"""The connector: learned queries look at the patches of each crop once (cross-attention), one answer a query."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers.modeling_layers import GradientCheckpointingLayer

from memfit.errors import UserError
from memfit.models.minicpmv.vision import Sizes, key_mask

HEAD_WIDTH = 128
EPS = 1e-6


@lru_cache(maxsize=8)
def frequencies(width: int) -> NDArray[np.float32]:
    """10000^(-j / width), j = 0 .. width - 1, in float32 steps as the checkpoints' code takes them."""
    exponents = np.arange(width, dtype=np.float32) / np.float32(width)
    return (np.float32(1) / np.float32(10000) ** exponents).astype(np.float32)


def sincos(count: int, width: int, device: torch.device) -> torch.Tensor:
    """(count, width) float32: sines of position x frequency, then the cosines."""
    speeds = torch.tensor(frequencies(width // 2), device=device)
    angles = torch.arange(count, dtype=torch.float32, device=device)[:, None] * speeds
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def crop_positions(sizes: Sizes, longest: int, width: int, device: torch.device) -> torch.Tensor:
    """(crops, longest, width) float32: where each patch lies. The first half tells its column, the second its row."""
    places = np.zeros((2, len(sizes), longest), dtype=np.int64)
    for crop, (rows, columns) in enumerate(sizes):
        places[0, crop, : rows * columns] = np.tile(np.arange(columns), rows)
        places[1, crop, : rows * columns] = np.repeat(np.arange(rows), columns)
    table = sincos(int(places.max(initial=0)) + 1, width // 2, device)
    columns_CL, rows_CL = torch.tensor(places, device=device).unbind(0)
    return torch.cat([F.embedding(columns_CL, table), F.embedding(rows_CL, table)], dim=2)


def refuse_time_steps(temporal_ids: Any) -> None:
    """UserError when a picture has a place in time (an id of 0 or more); -1 stands for none, at any depth of lists.

    V 4.5 adds a vector of its place in time to the keys of every frame and looks at up to six frames at once. Without
    such ids its resampler is that of 2.6, weight by weight, and so are its answers.
    """
    if temporal_ids is None:
        return
    if isinstance(temporal_ids, list | tuple):
        for inner in temporal_ids:
            refuse_time_steps(inner)
    elif bool(torch.as_tensor(temporal_ids).ge(0).any()):
        raise UserError(
            "temporal_ids gives pictures a place in time: video is neither trained nor generated from here",
            "show frames as pictures of their own: max_slice_nums=1, use_image_id=False, and no temporal_ids",
        )


class ResamplerAttention(nn.Module):
    """Multi-head attention with packed projections, named as torch's; `out_proj` is called, so adapters may wrap it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """query (Q, D), the same for all crops; key, value (C, L, D); mask (C, L). Returns (C, Q, D)."""
        crops, longest, width = key.shape
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q = F.linear(query, weights[0], biases[0]).view(1, -1, self.heads, HEAD_WIDTH).transpose(1, 2)
        k = F.linear(key, weights[1], biases[1]).view(crops, longest, self.heads, HEAD_WIDTH).transpose(1, 2)
        v = F.linear(value, weights[2], biases[2]).view(crops, longest, self.heads, HEAD_WIDTH).transpose(1, 2)
        where = None if mask is None else mask[:, None, None, :]
        out = F.scaled_dot_product_attention(q.expand(crops, -1, -1, -1), k, v, attn_mask=where)
        return self.out_proj(out.transpose(1, 2).reshape(crops, -1, width))


class Resampler(GradientCheckpointingLayer):
    """Patch features of each crop to `queries` vectors of the language model's width.

    No buffer: positions are computed for the crops at hand, so none can be lost, cast or misplaced. The bare
    parameters are read in the forward of the module that owns them, which ZeRO-3 needs.
    """

    def __init__(self, queries: int, width: int, vision_width: int) -> None:
        super().__init__()
        if width % HEAD_WIDTH:
            raise ValueError(f"the resampler needs a width that {HEAD_WIDTH} divides, not {width}")
        self.query = nn.Parameter(torch.empty(queries, width))
        self.kv_proj = nn.Linear(vision_width, width, bias=False) if vision_width != width else nn.Identity()
        self.attn = ResamplerAttention(width)
        self.ln_q = nn.LayerNorm(width, eps=EPS)
        self.ln_kv = nn.LayerNorm(width, eps=EPS)
        self.ln_post = nn.LayerNorm(width, eps=EPS)
        self.proj = nn.Parameter(torch.empty(width, width))

    def forward(self, hidden: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """(C, L, vision width), rows behind a crop's patches ignored -> (C, Q, width)."""
        value = self.ln_kv(self.kv_proj(hidden))
        positions = crop_positions(sizes, hidden.shape[1], value.shape[2], hidden.device)
        mask = key_mask(sizes, hidden.shape[1], hidden.device)
        out = self.attn(self.ln_q(self.query), value + positions.to(value.dtype), value, mask)
        return self.ln_post(out) @ self.proj
