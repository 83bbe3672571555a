"""Tiny models and data sets for tests: yours and memfit's own. Nothing is downloaded.

>>> from memfit.testing import make_dummy, make_samples       # doctest: +SKIP
>>> folder = make_dummy("minicpmv4_6", Path("dummy"))         # doctest: +SKIP
>>> data = make_samples(Path("dummy_data"), count=8)          # doctest: +SKIP
"""

from __future__ import annotations

from memfit.testing.models import KINDS, NATIVE_KINDS, make_dummy
from memfit.testing.samples import make_samples

__all__ = ["KINDS", "NATIVE_KINDS", "make_dummy", "make_samples"]
