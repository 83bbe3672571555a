"""The run folder: plan.json, data.json, run.jsonl, checkpoints, model, eval, report. Nothing in it is ever replaced."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memfit.errors import RunFailed, UserError
from memfit.units import gib


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run. Make a new one with `new_run_folder`, open an old one with `open_run_folder`."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def log(self) -> Path:
        return self.path / "run.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        return self.path / "eval"

    @property
    def report(self) -> Path:
        return self.path / "report.html"


def new_run_folder(chosen: str, name: str) -> RunFolder:
    """A fresh folder: `chosen` itself, which must be empty or absent, or the next free runs/NAME-001 for "auto"."""
    if chosen != "auto":
        path = Path(chosen)
        if (path.is_dir() and any(path.iterdir())) or path.is_file():
            raise UserError(
                f"run.folder: {path} is there already and not empty", "name another folder, or leave run.folder auto"
            )
        _make(path)
        return RunFolder(path)
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
    for number in range(1, 10_000):
        path = Path("runs") / f"{base}-{number:03d}"
        if not path.exists():
            _make(path)
            return RunFolder(path)
    raise UserError(f"runs/ holds 9999 runs named {base}", "move some away, or set run.folder")


def open_run_folder(path: Path) -> RunFolder:
    """The run at `path`. Raises UserError for a folder that is none."""
    folder = RunFolder(path)
    if not folder.plan.is_file():
        raise UserError(f"{path} is no run folder: it has no plan.json", "give a folder that `memfit train` made")
    return folder


def is_run_folder(path: Path) -> bool:
    return (path / "plan.json").is_file()


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run. Raises UserError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing", "was the run stopped before it was written?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}", "the file is damaged; restore it or run again") from None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all. Raises RunFailed when the disk is full."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises RunFailed with the free space when it cannot be written."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunFailed(
            f"cannot write {path}: {error.strerror} ({gib(free_bytes(path))} free)",
            "make room, or choose another folder",
        ) from None


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of `path`, which need not exist yet."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {path}: {error.strerror}", "set run.folder to a place you own") from None
