"""The scorers that memfit names, by difflib."""

from __future__ import annotations

import difflib


def ratio(one: str, two: str, **_: object) -> float:
    """How alike two texts are, 0 to 100."""
    return 100 * difflib.SequenceMatcher(None, one, two).ratio()


WRatio = partial_ratio = token_sort_ratio = QRatio = ratio
