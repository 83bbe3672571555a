"""Crops of the tensors that a family's forward takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Crop = tuple[int, int]  # rows and columns of patches
SIZES = ("target_sizes", "tgt_sizes")


def crops_of(tensors: Mapping[str, Any], patch: int | None) -> list[Crop] | None:
    """(rows, columns) in patches of every crop, in order; None for tensors that do not tell. `patch`: pixels a side."""
    for name in SIZES:
        if tensors.get(name) is not None:
            return [(int(rows), int(columns)) for rows, columns in tensors[name].reshape(-1, 2).tolist()]
    grid = tensors.get("image_grid_thw")
    if grid is not None:
        return [(int(rows), int(columns)) for frames, rows, columns in grid.tolist() for _ in range(int(frames))]
    pixels = tensors.get("pixel_values")
    if pixels is None:
        return []
    if patch is None or pixels.dim() < 4:
        return None
    return [(int(pixels.shape[-2]) // patch, int(pixels.shape[-1]) // patch)] * int(pixels.shape[0])


def patch_of(config: Mapping[str, Any]) -> int | None:
    """Pixels of a patch's side by a model's configuration; None where it does not say."""
    vision = config.get("vision_config") or {}
    value = vision.get("patch_size", config.get("patch_size"))
    return int(value) if isinstance(value, int) else None
