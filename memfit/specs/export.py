"""What `memfit export` is asked for and what it made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ExportRequest:
    """`run`: a run folder, or a checkpoint folder in one. `to`: merged or adapter. `out`: the folder to make, which
    must be empty or absent; None is RUN/exported/TO."""

    run: Path
    to: str
    out: Path | None = None


@dataclass(frozen=True)
class ExportResult:
    """`folder` holds all that a program needs to load it; `bytes` is its size on disk. `notes`: what to know of it."""

    folder: Path
    to: str
    bytes: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"folder": str(self.folder), "to": self.to, "bytes": self.bytes, "notes": list(self.notes)}
