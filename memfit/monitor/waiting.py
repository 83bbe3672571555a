"""One line on a terminal while something takes seconds: what it is and for how long it has been going on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

PATIENCE = 0.7  # seconds before a word is said: a cached answer is faster
EVERY = 1.0
COUNTED_EVERY = 5.0


@contextmanager
def waiting(
    stream: TextIO, text: str, patience: float = PATIENCE, clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """Within, show `text` and the seconds since, rewritten in place and wiped at the end. Only on a terminal."""
    if not stream.isatty():
        yield
        return
    done = threading.Event()
    start = clock()
    shown: list[int] = []

    def tell() -> None:
        pause = patience
        while not done.wait(pause):
            line = f"  {text} ... {clock() - start:.0f} s"
            stream.write(f"\r{line}")
            stream.flush()
            shown.append(len(line))
            pause = EVERY

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if shown:
            stream.write("\r" + " " * max(shown) + "\r")
            stream.flush()


class Counter:
    """Progress in lines: how many are done, told now and then by `say`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._told = say, time.monotonic()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if done and now - self._told >= COUNTED_EVERY:
            self._told = now
            self._say(f"{what}: {done:,}" + (f" of {total:,}" if total is not None else ""))
