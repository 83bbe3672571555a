"""Ranks that wait for each other for ever end with an error that says where each of them stands.

torch's own exchanges give up after the group's timeout; DeepSpeed's shared memory between CPU ranks never does
(deepspeed/csrc/cpu/comm/shm.cpp spins), and neither does a rank whose own loop stands still.
"""

from __future__ import annotations

import faulthandler
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

STALLED = "rank-{rank}.stalled.txt"
_FRAME = re.compile(r'^\s+File "(.+)", line (\d+) in (\S+)$', re.MULTILINE)
_MAIN = re.compile(r"^(?:Current thread|Thread) .*\(most recent call first\):\n((?:\s+File .*\n?)+)", re.MULTILINE)


class Patience(TrainerCallback):
    """Ends this process when no micro-batch, evaluation or save has ended for `seconds`; its stacks go to `file`."""

    def __init__(self, file: Path, seconds: float) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("w", encoding="utf-8")
        self._seconds = seconds

    def moved(self, *args: Any, **kwargs: Any) -> None:
        """Begin to wait anew."""
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._stream)

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """Wait no longer."""
        faulthandler.cancel_dump_traceback_later()

    on_train_begin = on_step_begin = on_substep_end = on_step_end = moved
    on_prediction_step = on_evaluate = on_save = moved
    on_train_end = stop


def stalled(logs: Path) -> list[str]:
    """Where each rank stood that gave up waiting: "rank 0 in all_reduce (comm.py:12)". Empty when none did."""
    found = []
    for file in sorted(logs.glob(STALLED.format(rank="*"))):
        text = file.read_text(encoding="utf-8")
        if text.strip():
            rank = file.name.split(".")[0].removeprefix("rank-")
            found.append(f"rank {rank} in {_place(text)}")
    return found


def _place(text: str) -> str:
    """The innermost frame of the main thread, which faulthandler writes last."""
    stacks = _MAIN.findall(text)
    frame = _FRAME.search(stacks[-1]) if stacks else None
    if frame is None:
        return "an unknown place"
    path, line, name = frame.groups()
    return f"{name} ({Path(path).name}:{line})"
