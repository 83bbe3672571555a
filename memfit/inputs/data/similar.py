"""Near-duplicate pictures in bounded time: candidates by locality-sensitive hashing, each confirmed on thumbnails.

What counts as near: the same picture re-encoded, resized, or a little brighter or flatter. A crop, a turn or a shift is
not found. Forms that differ in a few strokes only are too alike to tell apart at this size and are reported.

A plain 64-bit difference hash would call all pages of one printed form alike. So the hash is taken twice: of the
picture, and of what is left after the mean picture of the data set is taken away, which is the form. Only pictures
that share a 16-bit band of a hash, and are neighbours when sorted, are compared: the work grows as n log n even when
all are alike. Source of the hash: random hyperplanes, Charikar 2002, "Similarity estimation techniques from rounding
algorithms".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memfit.inputs.data.scan import THUMB

Array = np.ndarray

_BITS, _BANDS = 128, 8
_HASHED = 32  # side of the picture that is hashed: half the thumbnail's, which quiets resampling noise
# Neighbours compared in a run of equal bands, and the most differing bits: (of the whole picture, of what is left).
_NEIGHBOURS = (2, 8)
_MOST_BITS = (10, 24)
# Confirmation on the thumbnails after the best gain and offset: largest difference (of 255), and RMS difference
# relative to the contrast. Tried on text pages of 620 x 877 and 1240 x 1754: JPEG quality 20, half size, a pixel cut
# off all round and 10 % of brightness give at most 6 and 0.05; another text at least 44 and 0.34, four other numbers on
# the same page at least 9. In small pictures single strokes count: on forms of 168 x 168 JPEG quality 50 and three
# quarters of the size give at most 21 and 0.10, other entries at least 125 and 0.39; half size (33, 0.15) is missed.
MOST_DIFFERENCE, MOST_IN_SMALL = 8.0, 22.0
SMALL = 512  # pixels of the shorter side: below, a thumbnail's cell is less than 8 pixels wide
MOST_RELATIVE = 0.15
_GAIN = (0.67, 1.5)
_SAME_SHAPE = 0.03  # log of the ratio of the aspect ratios; rounding of a 34 px side when halved gives 0.03
_CHUNK = 2048  # pairs or pictures at a time: 32 MiB of float32 thumbnails


def near_duplicates(thumbs: Sequence[bytes], sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of pictures that look the same. `sizes` are (width, height).

    `thumbs` are THUMB x THUMB grey bytes. Not every pair of a larger group is listed, but enough to connect the group.
    """
    if len(thumbs) < 2:
        return []
    pictures = np.frombuffer(b"".join(thumbs), dtype=np.uint8).reshape(len(thumbs), THUMB * THUMB)
    shapes = np.log([width / height for width, height in sizes])
    candidates = [
        _candidates(codes, *limits) for codes, *limits in zip(_hashes(pictures), _NEIGHBOURS, _MOST_BITS, strict=True)
    ]
    pairs = np.unique(np.concatenate(candidates), axis=0)
    pairs = pairs[np.abs(shapes[pairs[:, 0]] - shapes[pairs[:, 1]]) <= _SAME_SHAPE]
    short = np.array([min(size) for size in sizes])
    limits = np.where(short[pairs].min(axis=1) < SMALL, MOST_IN_SMALL, MOST_DIFFERENCE)
    found: list[tuple[int, int]] = []
    for at in range(0, len(pairs), _CHUNK):
        chunk = pairs[at : at + _CHUNK]
        found += map(tuple, chunk[_look_alike(pictures, chunk, limits[at : at + _CHUNK])].tolist())
    return found


def _hashes(pictures: Array) -> tuple[Array, Array]:
    """Codes [n, _BANDS] uint16 of the pictures, and of the pictures less their mean."""
    planes = np.random.default_rng(0).standard_normal((_HASHED * _HASHED, _BITS)).astype(np.float32)
    total = np.zeros(_HASHED * _HASHED, dtype=np.float64)
    starts = range(0, len(pictures), _CHUNK)
    for at in starts:
        total += _flat(pictures[at : at + _CHUNK]).sum(axis=0, dtype=np.float64)
    mean = (total / len(pictures)).astype(np.float32)
    plain, left = [], []
    for at in starts:
        flat = _flat(pictures[at : at + _CHUNK])
        plain.append(_code(flat @ planes))
        left.append(_code((flat - mean) @ planes))
    return np.concatenate(plain), np.concatenate(left)


def _flat(pictures: Array) -> Array:
    """[n, _HASHED^2] float32: block means, each picture's own mean taken away."""
    step = THUMB // _HASHED
    blocks = pictures.reshape(-1, _HASHED, step, _HASHED, step).mean(axis=(2, 4), dtype=np.float32)
    flat = blocks.reshape(len(pictures), -1)
    return flat - flat.mean(axis=1, keepdims=True)


def _code(projections: Array) -> Array:
    return np.ascontiguousarray(np.packbits(projections > 0, axis=1)).view(np.uint16)


def _candidates(codes: Array, neighbours: int, most_bits: int) -> Array:
    """Pairs [m, 2] that share a band and differ in at most `most_bits` of _BITS bits."""
    found = [np.empty((0, 2), dtype=np.int64)]
    for band in range(_BANDS):
        others = [codes[:, (band + shift) % _BANDS] for shift in range(_BANDS - 1, -1, -1)]
        order = np.lexsort(others)  # by this band, then by the next ones: the most alike become neighbours
        key = codes[order, band]
        for step in range(1, min(neighbours, len(order) - 1) + 1):
            same = key[:-step] == key[step:]
            i, j = order[:-step][same], order[step:][same]
            near = np.bitwise_count(codes[i] ^ codes[j]).sum(axis=1, dtype=np.int64) <= most_bits
            found.append(np.sort(np.stack([i[near], j[near]], axis=1), axis=1))
    return np.concatenate(found)


def _look_alike(pictures: Array, pairs: Array, most: Array) -> Array:
    """[m] of bool: which `pairs` [m, 2] differ by at most `most` [m] and MOST_RELATIVE, gain and offset aside."""
    a = pictures[pairs[:, 0]].astype(np.float32)
    b = pictures[pairs[:, 1]].astype(np.float32)
    a -= a.mean(axis=1, keepdims=True)
    b -= b.mean(axis=1, keepdims=True)
    contrast = np.maximum((a * a).sum(axis=1), 1e-6)
    gain = np.clip((a * b).sum(axis=1) / np.maximum((b * b).sum(axis=1), 1e-6), *_GAIN)
    a -= gain[:, None] * b
    largest = np.abs(a).max(axis=1)
    relative = np.sqrt((a * a).sum(axis=1) / contrast)
    return (largest <= most) & (relative <= MOST_RELATIVE)
