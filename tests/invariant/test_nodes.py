"""Two machines, as docs/nodes.md starts them: two network namespaces that see each other by one wire only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfit.testing import make_dummy, make_samples
from tests.invariant.test_trajectories import COMMON, LAYOUTS
from tests.invariant.trajectories import Case, Common, _job, follows, outcome, run_alone

SECONDS = 240
PORT = 29_517


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[tuple[str, str, str]]]:
    """(namespace, its address, its end of the wire) of two; skipped where they may not be made."""
    mark = f"{os.getpid() % 10_000}"
    names, ends = [f"memfit{mark}a", f"memfit{mark}b"], [f"mf{mark}a", f"mf{mark}b"]
    if shutil.which("ip") is None:
        pytest.skip("the command ip is not there")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for place, (name, end) in enumerate(zip(names, ends, strict=True)):
            ip("-n", name, "addr", "add", f"10.213.7.{place + 1}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [(name, f"10.213.7.{place + 1}", end) for place, (name, end) in enumerate(zip(names, ends, strict=True))]
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def torchrun(folder: Path, machine: tuple[str, str, str], first: str) -> subprocess.Popen[str]:
    """The command of docs/nodes.md on one of the machines."""
    name, address, end = machine
    words = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    words += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:{PORT}"]
    words += ["--rdzv-id", folder.name, "--local-addr", address]
    words += ["--rdzv-conf", f"is_host={int(address == first)}"]  # both machines have this one's host name
    words += ["-m", "memfit.engine.worker", str(folder)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": end, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.long
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_machines_learn_what_one_process_learns(
    tmp_path: Path, machines: list[tuple[str, str, str]], name: str
) -> None:
    data = make_samples(tmp_path / "samples", 9)
    sets = (*COMMON, "method=full", "schedule.steps=3")
    common = Common(make_dummy("qwen2_5_vl", tmp_path / "model"), data, sets)
    case = Case(name, ("hardware.gpus=2x1xcpu", *LAYOUTS[name]))
    folder = _job(common, case, tmp_path / "run").folder.path
    started = [torchrun(folder, machine, machines[0][1]) for machine in machines]
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    assert (folder / "logs" / "result.json").exists()
    assert (folder / "logs" / "rank-1.jsonl").exists()
    alone = run_alone(common, Case("none", ("hardware.gpus=1xcpu",)), tmp_path / "alone")
    follows("two machines", name, alone, outcome(folder))
