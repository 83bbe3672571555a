"""The allocator seen from below: every posix_memalign and free of a process, in all its threads.

torch.profiler sees the thread that it was started in. A rank under gloo frees buffers in the group's own threads, so
ranks are recorded with a small library that is preloaded (recorder.c); in one process both give the same, which a test
checks.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy_cpu.events import Marked, Memory

SOURCE = Path(__file__).with_name("recorder.c")
RECORD = np.dtype([("time", "<i8"), ("address", "<u8"), ("size", "<u8")])
ROOM = 4_000_000  # records of one process; its file is sparse


def build_recorder(folder: Path) -> Path:
    """The compiled library in `folder`. RuntimeError without a C compiler."""
    library = folder / "recorder.so"
    if library.exists() and library.stat().st_mtime > SOURCE.stat().st_mtime:
        return library
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("cells on two ranks are recorded with a C library, and there is no C compiler")
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


def environment(folder: Path, records: Path) -> dict[str, str]:
    """What a process needs in its environment to write its records to `records`."""
    with records.open("wb") as file:
        file.truncate(8 + ROOM * RECORD.itemsize)
    return {"LD_PRELOAD": str(build_recorder(folder)), "MEMFIT_RECORDER": str(records)}


class Recorder:
    """Watches as `events.Profiler` does, in a process that was started with `environment`."""

    def __init__(self, records: Path) -> None:
        self._records = records
        self._marks: list[Marked] = []
        self._switch = ctypes.CDLL(None).recorder_switch

    def __enter__(self) -> Recorder:
        if not self._switch(1):
            raise RuntimeError("libc10 is not loaded: nothing of torch's would be recorded")
        return self

    def __exit__(self, *error: Any) -> None:
        self._switch(0)

    @contextmanager
    def mark(self, name: str) -> Iterator[None]:
        """A span with a name, on the recorder's clock."""
        start = time.monotonic_ns()
        yield
        self._marks.append(Marked(start, time.monotonic_ns(), name))

    def read(self) -> tuple[list[Memory], list[Marked]]:
        """All allocations and frees, and all marks, in the order of time. RuntimeError when the file was too small."""
        data = np.memmap(self._records, dtype=np.uint8, mode="r")
        count = int(data[:8].view("<u8")[0])
        if count > ROOM:
            raise RuntimeError(f"{count} records, room for {ROOM}")
        rows = data[8 : 8 + count * RECORD.itemsize].view(RECORD)
        # Threads write in the order of their places, not of their clocks.
        rows = rows[np.argsort(rows["time"], kind="stable")]
        memory = [
            Memory(when, address, size or -1)
            for when, address, size in zip(
                rows["time"].tolist(), rows["address"].tolist(), rows["size"].tolist(), strict=True
            )
        ]
        return memory, sorted(self._marks)
