"""The vision tower: SigLIP's blocks on crops of any shape (NaViT), positions looked up in a fixed square table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

Sizes = Sequence[tuple[int, int]]  # (rows, columns) in patches of every crop

_GROUP, _STRIDE = 8, 16


def cpu_arange(start: float, step: float, count: int) -> NDArray[np.float32]:
    """The `count` values that torch.arange gives in float32 on a CPU: start, start + step, ...

    Rounding as in its kernel, whatever machine this runs on: in the vectorised part, eight values at a time, the
    group's first value is rounded before the rest is added
    (aten/src/ATen/native/cpu/RangeFactoriesKernel.cpp:arange and vec256/vec512 Vectorized<float>::arange).
    """
    index = np.arange(count)
    group = index // _GROUP * _GROUP
    first = (start + step * group).astype(np.float32).astype(np.float64)
    vectorised = index < count // _STRIDE * _STRIDE
    return np.where(vectorised, first + (index - group) * step, start + step * index).astype(np.float32)


@lru_cache(maxsize=512)
def buckets(count: int, side: int) -> NDArray[np.int64]:
    """The row (or column) of the position table that each of `count` patches along one side takes, [count].

    Patch i lies at x = i / count and takes the number of boundaries k / side (k = 1 .. side - 1) that are not above x.
    x often equals a boundary, so the rounding of both decides: it is that of the code the checkpoints were trained
    with (modeling_navit_siglip.py: SiglipVisionEmbeddings.forward), whose step is a float32 and whose side is not.
    """
    x = cpu_arange(0.0, float(np.float32(1) / np.float32(count)), count)
    # As many as torch.arange(1 / side, 1, 1 / side) has; one at 1 itself is above every x.
    boundaries = cpu_arange(1 / side, 1 / side, math.ceil((1 - 1 / side) / (1 / side)))
    return np.searchsorted(boundaries, x, side="right").astype(np.int64)


def position_ids(sizes: Sizes, side: int, one_row: bool) -> list[NDArray[np.int64]]:
    """Places in the side x side table of each crop's patches; `one_row`: V 2.5, a crop is one row of patches."""
    if one_row:
        return [buckets(rows * columns, side) for rows, columns in sizes]
    return [(buckets(rows, side)[:, None] * side + buckets(columns, side)).reshape(-1) for rows, columns in sizes]


def padded_patches(pixels: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """(patches of all crops, values) -> (crops, longest, values) in float, zeros behind shorter crops.

    Bytes are normalised here, on the device they are on: (byte / 255 - 0.5) / 0.5; floats are taken as they are.
    """
    if pixels.dtype == torch.uint8:
        pixels = pixels.to(torch.float32).div_(255).sub_(0.5).div_(0.5)
    lengths = [rows * columns for rows, columns in sizes]
    if min(lengths) == max(lengths):
        return pixels.reshape(len(lengths), lengths[0], -1)
    return pad_sequence(pixels.split(lengths), batch_first=True)


def key_mask(sizes: Sizes, longest: int, device: torch.device) -> torch.Tensor | None:
    """(crops, longest), true at patches; None where nothing is padded."""
    lengths = [rows * columns for rows, columns in sizes]
    if min(lengths) == longest:
        return None
    return torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]


class PatchEmbedding(nn.Conv2d):
    """A convolution with kernel = stride = patch on patches that are cut already, which is one matrix product."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(..., channels * patch * patch) -> (..., hidden), in the weight's dtype."""
        return nn.functional.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class VisionEmbeddings(nn.Module):
    """Patch embedding plus learned positions."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        patch, width = config.patch_size, config.hidden_size
        self.side = config.image_size // patch
        self.patch_embedding = PatchEmbedding(config.num_channels, width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(self.side**2, width)

    def forward(self, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(crops, longest, values) and (crops, longest) -> (crops, longest, hidden)."""
        return self.patch_embedding(patches) + self.position_embedding(positions)


class VisionEncoder(nn.Module):
    """The numbered blocks; each one can be checkpointed."""

    def __init__(self, config: SiglipVisionConfig, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(layers))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden


class VisionTower(nn.Module):
    """Crops to patch features, all crops in one call: ranks with unequal crops run the same modules.

    `one_row` and `joint` are V 2.5's: positions along one row, and (`joint`, for parity with the original only) crops
    that see the padding of the longest crop in the batch. Without `joint` every crop is as if it were alone.
    """

    def __init__(self, config: SiglipVisionConfig, layers: int, one_row: bool) -> None:
        super().__init__()
        self.config = config
        self.one_row = one_row
        self.joint = False
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config, layers)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """(patches of all crops, values) -> (crops, longest, hidden); rows behind a crop's patches hold anything."""
        patches = padded_patches(pixels, sizes)
        longest = patches.shape[1]
        shared = self.one_row and self.joint
        ids = position_ids([(1, longest)] * len(sizes) if shared else sizes, self.embeddings.side, self.one_row)
        positions = np.zeros((len(sizes), longest), dtype=np.int64)
        for row, crop in zip(positions, ids, strict=True):
            row[: len(crop)] = crop
        hidden = self.embeddings(patches, torch.tensor(positions, device=patches.device))
        mask = None if shared else key_mask(sizes, longest, patches.device)
        return self.post_layernorm(self.encoder(hidden, self._for_kernel(mask, hidden.dtype)))

    def _for_kernel(self, mask: torch.Tensor | None, dtype: torch.dtype) -> Any:
        """The mask as the chosen attention takes it; never longest x longest."""
        if mask is None or "flash" in str(self.config._attn_implementation):
            return mask
        mask = mask[:, None, None, :]
        if self.config._attn_implementation != "eager":
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
