"""How wide the reader's terminal is."""

from __future__ import annotations

import shutil
from typing import TextIO

NARROWEST = 40


def width_of(stream: TextIO) -> int | None:
    """Columns of the terminal behind a stream (COLUMNS, else what it says itself); None for a file or a pipe."""
    if not stream.isatty():
        return None
    return max(NARROWEST, shutil.get_terminal_size().columns)
