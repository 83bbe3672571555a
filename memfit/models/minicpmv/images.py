"""Pictures to crops and patches with PIL and numpy, to the byte as the checkpoints' own image processor cuts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from memfit.families.minicpmv2 import DEFAULTS, crop_sizes, slice_grid


def slices(picture: Image.Image, settings: Mapping[str, Any]) -> list[Image.Image]:
    """The overview, then the slices row by row: RGB pictures whose sides are whole patches.

    Pillow's bicubic filter on 8-bit RGB; slices are cut from the original enlarged or shrunk to the whole grid.
    """
    picture = picture.convert("RGB")
    whole, piece = crop_sizes(*picture.size, settings)
    crops = [picture.resize(whole, Image.Resampling.BICUBIC)]
    rows, columns = slice_grid(*picture.size, settings)
    if rows:
        wide, high = piece
        grid = picture.resize((wide * columns, high * rows), Image.Resampling.BICUBIC)
        for row in range(rows):
            for column in range(columns):
                left, top = column * wide, row * high
                crops.append(grid.crop((left, top, left + wide, top + high)))
    return crops


def patches(crop: Image.Image, side: int) -> NDArray[np.uint8]:
    """(patches, 3 * side * side) bytes of one crop: patches row by row, each as channel, row, column."""
    pixels = np.asarray(crop, dtype=np.uint8)
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    blocks = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(blocks.reshape(rows * columns, 3 * side * side))


def packed(pictures: Sequence[Image.Image], settings: Mapping[str, Any]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All crops of some pictures in order: bytes (patches, 3 * side * side) and sizes (crops, 2) as (rows, columns)."""
    side = int(settings.get("patch_size") or DEFAULTS["patch_size"])
    crops = [crop for picture in pictures for crop in slices(picture, settings)]
    sizes = [(crop.height // side, crop.width // side) for crop in crops]
    if not crops:
        return np.zeros((0, 3 * side * side), np.uint8), np.zeros((0, 2), np.int64)
    return np.concatenate([patches(crop, side) for crop in crops]), np.asarray(sizes, dtype=np.int64)


def strip(packed_patches: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """One crop in the checkpoints' own layout: float32 (3, side, patches * side), (byte / 255 - 0.5) / 0.5."""
    count = len(packed_patches)
    values = packed_patches.reshape(count, 3, side, side).transpose(1, 2, 0, 3).reshape(3, side, count * side)
    return (values.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
