"""run.jsonl: one JSON object a line, written as things happen, so that a crash loses nothing."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any


class RunLog:
    """Appends events. A full disk must not kill a run that still trains: the first failure is told once on stderr."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._told = False

    def write(self, event: str, **values: Any) -> None:
        """One line: the event's name, the time in seconds since 1970, and its values; NaN becomes a text."""
        row = {"event": event, "time": round(time.time(), 3)} | {key: _plain(value) for key, value in values.items()}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            if not self._told:
                print(f"memfit: cannot write {self._path}: {error.strerror}; training goes on", file=sys.stderr)
            self._told = True


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
