"""The quarantine file: every broken row with its reason and its original, one JSON object a line."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from memfit.errors import UserError
from memfit.inputs.data.rows import read_rows
from memfit.specs.check import Broken


def write_quarantine(broken: Sequence[Broken], data_file: Path, folder: Path) -> Path:
    """Write the broken rows of `data_file` into `folder` as NAME.broken.jsonl and return the path.

    Keys of a line: row, line, id, reason, detail, original (the row; for a line that is no JSON its text). The
    originals are read from `data_file` again, so nothing large is kept for this. An existing file is never changed:
    when it says the same it is returned, otherwise the next free NAME.broken.2.jsonl is written. UserError when the
    folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{data_file.stem}.", suffix=".tmp")
        written = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                for entry in _entries(broken, data_file):
                    file.write(_line(entry))
            return _keep(written, folder / f"{data_file.stem}.broken")
        finally:
            written.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write the quarantine file ({error.strerror})", "free space or name another folder"
        ) from error


def _entries(broken: Sequence[Broken], data_file: Path) -> Iterator[dict[str, Any]]:
    waiting = {row.row: row for row in broken}
    for row in read_rows(data_file):
        bad = waiting.pop(row.number, None)
        if bad is not None:
            original = row.text if row.problem is not None else row.value
            yield {
                "row": bad.row,
                "line": bad.line,
                "id": bad.id,
                "reason": bad.reason,
                "detail": bad.detail,
                "original": original,
            }
        if not waiting:
            return


def _line(entry: dict[str, Any]) -> str:
    text = json.dumps(entry, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair: only the escaped form can be written
        text = json.dumps(entry)
    return text + "\n"


def _copy(written: Path, file: BinaryIO, target: Path) -> None:
    try:
        with written.open("rb") as source:
            shutil.copyfileobj(source, file)
        file.flush()
    except OSError:
        target.unlink()  # half a file would look like all of it
        raise


def _keep(written: Path, stem: Path) -> Path:
    number = 1
    while True:
        target = stem.with_name(f"{stem.name}{'' if number == 1 else f'.{number}'}.jsonl")
        try:
            with target.open("xb") as file:  # fails when the name is taken: nothing is ever overwritten
                _copy(written, file, target)
            return target
        except FileExistsError:
            if target.is_file() and filecmp.cmp(written, target, shallow=False):
                return target
            number += 1
