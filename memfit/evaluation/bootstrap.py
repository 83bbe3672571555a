"""Bootstrap intervals over documents, in pairs where two systems answered the same documents.

Documents are drawn with replacement, as many as there are; the score is computed on each draw; the 2.5th and 97.5th
percentiles are the interval (Efron and Tibshirani 1993, chapter 13). A difference is computed on the same draw for both
systems. The interval says how far the score depends on which documents were asked; it cannot show mistakes that none of
them provoked, so that it has no width where all documents came out alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from memfit.evaluation.metrics import Floats, ratio
from memfit.specs.evaluation import Score

RESAMPLES = 2000
LEVEL = (2.5, 97.5)  # percentiles of a 95% interval
_CELLS = 2_000_000  # numbers held at once, 16 MB


def draws(documents: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each document is drawn, in chunks [r, N] that make up `resamples` rows. The same for the same seed."""
    generator = np.random.default_rng(seed)
    chunk = max(1, _CELLS // max(documents, 1))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        picked = generator.integers(0, documents, size=(size, documents))
        picked += np.arange(size)[:, None] * documents
        yield np.bincount(picked.ravel(), minlength=size * documents).reshape(size, documents).astype(np.float64)


def resampled(figures: Floats, resamples: int, seed: int) -> Floats:
    """Sums over each draw, [resamples, K], of the documents' `figures` [N, K]."""
    return np.concatenate([weights @ figures for weights in draws(len(figures), resamples, seed)])


def score_with_interval(rows: Floats, name: str, resamples: int, seed: int) -> Score:
    """The ratio score `name` of `rows` [N, 2], numerators and denominators, with its interval; None on no documents."""
    if not len(rows):
        return Score(None)
    value = ratio(rows.sum(axis=0), name)
    return _score(float(value), ratio(resampled(rows, resamples, seed), name))


def difference(before: Floats, after: Floats, name: str, resamples: int, seed: int) -> tuple[Score, float]:
    """After minus before with its interval, and the share of draws above 0.

    `before` and `after` [N, 2] are numerators and denominators of the same documents in the same order.
    """
    both = resampled(np.concatenate([before, after], axis=1), resamples, seed)
    gaps = ratio(both[:, 2:], name) - ratio(both[:, :2], name)
    value = ratio(after.sum(axis=0), name) - ratio(before.sum(axis=0), name)
    known = gaps[~np.isnan(gaps)]
    return _score(float(value), gaps), float((known > 0).mean()) if len(known) else 0.0


def _score(value: float, values: Floats) -> Score:
    known = values[~np.isnan(values)]
    if np.isnan(value) or not len(known):
        return Score(None)
    low, high = np.percentile(known, LEVEL)
    return Score(value, float(low), float(high))
