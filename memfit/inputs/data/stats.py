"""Plain statistics for the report: histograms, and outliers that a few wild values do not hide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from memfit.specs.check import Distribution

_BINS = 12
# Iglewicz and Hoaglin 1993, "How to detect and handle outliers": |0.6745 (x - median) / MAD| > 3.5.
_SCORE, _NORMAL = 3.5, 0.6745
# Least distance in powers of two: where nearly all values are equal, MAD is nearly 0 and small differences would count.
_LEAST = 2.0


def distribution(name: str, values: Sequence[float] | NDArray[np.int64]) -> Distribution | None:
    """Mean, percentiles (nearest rank: each is one of the values), a histogram of equal bins; None without values."""
    if len(values) == 0:
        return None
    numbers = np.asarray(values, dtype=np.float64)
    p50, p90, p99 = np.percentile(numbers, (50, 90, 99), method="inverted_cdf")
    low, high = numbers.min(), numbers.max()
    counts, edges = np.histogram(numbers, bins=_BINS if high > low else 1, range=(low, high if high > low else low + 1))
    return Distribution(
        name=name,
        count=len(numbers),
        mean=float(numbers.mean()),
        minimum=float(low),
        p50=float(p50),
        p90=float(p90),
        p99=float(p99),
        maximum=float(high),
        edges=tuple(float(edge) for edge in edges),
        counts=tuple(int(count) for count in counts),
    )


def outliers(values: Sequence[float]) -> list[int]:
    """Indices of positive values that lie far from the median on a logarithmic scale, the farthest first.

    Far: a modified z-score above 3.5, and at least a factor of 4.
    """
    if len(values) < 3:
        return []
    logs = np.log2(np.maximum(np.asarray(values, dtype=np.float64), 1e-9))
    distance = np.abs(logs - np.median(logs))
    limit = max(_SCORE * float(np.median(distance)) / _NORMAL, _LEAST)
    far = np.flatnonzero(distance >= limit)
    return [int(index) for index in far[np.argsort(-distance[far], kind="stable")]]
