"""Processes start together and end together, and whoever waits hears why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from memfit.engine.launch import start
from memfit.errors import RunFailed, UserError

# The second rank writes down why it fails, as memfit.engine.worker does; the first waits for it.
FAILS = """
import os, sys, pathlib, time
from memfit.engine.worker import FAILURE, write_failure
from memfit.errors import UserError
if os.environ["RANK"] == "1":
    write_failure(pathlib.Path(sys.argv[1]) / FAILURE.format(rank=1), {error})
    sys.exit(1)
time.sleep(120)
"""


def script(folder: Path, text: str) -> str:
    path = folder / "rank.py"
    path.write_text(text)
    return str(path)


def test_every_rank_runs_and_the_others_speak_into_files(tmp_path: Path) -> None:
    text = "import os, pathlib, sys; pathlib.Path(sys.argv[1], os.environ['RANK']).touch(); print('from', os.getpid())"
    start([script(tmp_path, text), str(tmp_path)], 3, tmp_path / "logs")
    assert {path.name for path in tmp_path.iterdir()} >= {"0", "1", "2"}
    assert len(list((tmp_path / "logs").rglob("stdout.log"))) == 2


@pytest.mark.long
def test_a_user_error_of_a_rank_is_the_users_to_mend(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    began = time.monotonic()
    with pytest.raises(UserError, match="no room") as caught:
        start([script(tmp_path, FAILS.format(error='UserError("no room", "make room")')), str(logs)], 2, logs)
    assert caught.value.hint == "make room"
    assert time.monotonic() - began < 60  # the rank that waited was ended


@pytest.mark.long
def test_an_unknown_error_comes_with_its_rank_and_its_last_words(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    with pytest.raises(RunFailed, match="rank 1 failed: KeyError: 'weight'") as caught:
        start([script(tmp_path, FAILS.format(error='KeyError("weight")')), str(logs)], 2, logs)
    assert caught.value.exit_code == 5
    assert "rank-1.failed.json" in caught.value.hint


def test_a_killed_rank_ends_the_run_and_host_memory_is_named(tmp_path: Path) -> None:
    text = (
        "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(120)"
    )
    with pytest.raises(RunFailed, match="rank 1 ended by SIGKILL") as caught:
        start([script(tmp_path, text)], 2, tmp_path / "logs")
    assert "host memory" in caught.value.hint


@pytest.mark.long
def test_an_interrupt_ends_every_rank(tmp_path: Path) -> None:
    text = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], os.environ['RANK']).touch(); time.sleep(120)"
    whole = f"""
import pathlib
from memfit.engine.launch import start
try:
    start([{script(tmp_path, text)!r}, {str(tmp_path)!r}], 2, pathlib.Path({str(tmp_path / "logs")!r}))
except KeyboardInterrupt:
    raise SystemExit(130)
"""
    process = subprocess.Popen([sys.executable, "-c", whole])
    limit = time.monotonic() + 60
    while not all((tmp_path / rank).exists() for rank in "01"):
        assert time.monotonic() < limit
        assert process.poll() is None
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


@pytest.mark.long
def test_ranks_that_wait_for_ever_are_ended_and_named(tmp_path: Path) -> None:
    text = """
import os, pathlib, sys, time
from memfit.engine.stall import STALLED, Patience
def waits_for_the_other():
    while True:
        time.sleep(0.01)
patience = Patience(pathlib.Path(sys.argv[1]) / STALLED.format(rank=os.environ["RANK"]), 2)
patience.on_train_begin()
if os.environ["RANK"] == "1":
    patience.on_train_end()  # this one is done and would live on
    time.sleep(120)
waits_for_the_other()
"""
    began = time.monotonic()
    with pytest.raises(RunFailed, match=r"rank 0 in waits_for_the_other \(rank.py:6\)"):
        start([script(tmp_path, text), str(tmp_path / "logs")], 2, tmp_path / "logs")
    assert time.monotonic() - began < 60


def test_patience_is_called_where_transformers_calls() -> None:
    """The names that the waiting is renewed by are upstream's."""
    from transformers import TrainerCallback

    from memfit.engine.stall import Patience

    own = {name for name in vars(Patience) if name.startswith("on_")}
    assert own == {name for name in own if hasattr(TrainerCallback, name)}
    assert {"on_substep_end", "on_step_end", "on_train_end"} <= own
