"""Records: one JSON file a cell and side (forecast, measured), whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "records"
SCHEMA = 1


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Write and rename, so that a run that is killed leaves no half of a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"schema": SCHEMA, **value}, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_record(path: Path) -> dict[str, Any] | None:
    """A record, or None where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and value.get("schema") == SCHEMA else None


def pairs(folder: Path = FOLDER) -> Iterator[tuple[str, dict[str, Any] | None, dict[str, Any]]]:
    """(machine, forecast or None, measured) of every measured cell."""
    for path in sorted(folder.glob("*/*.measured.json")):
        measured = read_record(path)
        if measured is not None:
            forecast = read_record(path.with_name(path.name.replace(".measured.", ".forecast.")))
            yield path.parent.name, forecast, measured
