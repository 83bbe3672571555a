"""What a process that answers once leaves out: looking for cyclic garbage, and a package that no forecast calls.

Importing torch and transformers makes a million objects that stay; looking through them again and again takes a quarter
of a cold forecast.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# transformers.loss.loss_for_object_detection imports scipy.optimize wherever it is installed, half a second, for a loss
# of models that are no language models. None in sys.modules makes it count as not installed (importlib.util.find_spec).
UNUSED = ("scipy",)


@contextmanager
def no_collection() -> Iterator[None]:
    """Within, cyclic garbage stays where it is."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def one_answer() -> None:
    """For a process that answers once and ends: no cyclic garbage is looked for, and none at its end; `UNUSED` packages
    that are not loaded yet count as not installed."""
    gc.disable()
    for name in UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    atexit.register(gc.freeze)
