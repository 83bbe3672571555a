"""When Python looks for cyclic garbage: not while torch is imported and a step is traced, nor at the end of a command.

Importing torch and transformers makes a million objects that stay; looking through them again and again takes a quarter
of a cold forecast.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
    """For a process that answers once and ends: no cyclic garbage is looked for, and none at its end."""
    gc.disable()
    atexit.register(gc.freeze)
