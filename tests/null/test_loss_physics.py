"""Bytes of cross-entropy for every logit. tests/unit/test_loss_bytes.py measures the same on real tensors."""

from __future__ import annotations

import numpy as np
import pytest

from memfit.physics.loss import PATHS, LossBytes, loss_bytes
from memfit.units import GIB


@pytest.mark.parametrize(
    ("path", "width", "alive", "expected"),
    [
        ("full-logits", 2, False, (10, 6, 12)),
        ("full-logits", 2, True, (10, 6, 14)),
        ("full-logits", 4, False, (8, 8, 12)),
        ("full-logits", 4, True, (8, 8, 16)),
        ("full-logits-2024", 2, True, (12, 8, 16)),
        ("full-logits-2024", 2, False, (12, 8, 12)),
    ],
)
def test_bytes_a_logit(path: str, width: int, alive: bool, expected: tuple[int, int, int]) -> None:
    assert loss_bytes(1, width, alive, path) == LossBytes(*expected)


def test_a_long_sample_of_a_large_vocabulary() -> None:
    # 8192 x 151936 logits: 13.9 GiB in the backward although the model around it is checkpointed
    assert loss_bytes(8192 * 151936).backward_peak / GIB == pytest.approx(13.91, abs=0.005)


def test_arrays_of_candidates() -> None:
    tokens = np.array([1, 100, 4096])
    assert list(loss_bytes(tokens * 1000).backward_peak) == [12_000, 1_200_000, 49_152_000]


def test_every_path_names_its_source() -> None:
    assert all(name == path.name and path.source for name, path in PATHS.items())
