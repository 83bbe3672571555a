"""Two ranks with unequal crops and text-only samples learn what one process learns, and nobody hangs."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SECONDS = 200  # a hang is the error looked for
BUILD_SECONDS = 500  # DeepSpeed compiles its operators on first use


def losses(engine: str, folder: Path, out: Path, ranks: int = 1) -> list[float]:
    seconds = BUILD_SECONDS if engine == "zero3" else SECONDS
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(ranks):
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", **world}
        command = [sys.executable, "-m", "tests.unit.minicpmv_rank", engine, str(folder), str(out)]
        env = {**os.environ, **(own if ranks > 1 else {})}
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        said = [process.communicate(timeout=seconds)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * ranks, "\n".join(text[-3000:] for text in said)
    return list(json.loads(out.read_text()))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["minicpmv2_6"])
def test_fsdp2_follows_one_process(dummies: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    alone = losses("one", dummies(kind), tmp_path / "one.json")
    assert alone[0] != pytest.approx(alone[-1], rel=1e-2)
    assert losses("fsdp", dummies(kind), tmp_path / "two.json", 2) == pytest.approx(alone, rel=2e-5)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero3_follows_one_process(dummies: Callable[[str], Path], tmp_path: Path) -> None:
    folder = dummies("minicpmv2_6")
    alone = losses("one", folder, tmp_path / "one.json")
    assert losses("zero3", folder, tmp_path / "two.json", 2) == pytest.approx(alone, rel=2e-5)
