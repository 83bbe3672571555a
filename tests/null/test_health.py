"""memfit doctor: every finding with its number and its fix, on machines that are given, not on this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memfit.inputs import health, machine, toolchain
from memfit.inputs.health import Place, examine
from memfit.inputs.toolchain import Toolchain, find_toolchain, is_built, is_live
from memfit.specs.health import Health, HealthFinding

QUERY = {
    "index,name": "0, NVIDIA GeForce RTX 3090, 24576, 580.82.07, GPU-aa, 8.6\n"
    "1, NVIDIA GeForce RTX 3090, 24576, 580.82.07, GPU-bb, 8.6\n",
    "index,uuid": "0, GPU-aa, 9000, 4, 16\n1, GPU-bb, 10, 4, 16\n",
    "gpu_uuid,pid,used_memory,": "GPU-aa, 4711, 8990, /usr/bin/python3\n",
}


def smi(*words: str) -> str | None:
    """A machine with two cards, one of them in use."""
    if not words:
        return "| NVIDIA-SMI 580.82.07    Driver Version: 580.82.07    CUDA Version: 13.0 |"
    return next((text for start, text in QUERY.items() if words[0].split("=")[-1].startswith(start)), None)


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Health]:
    def look(cuda: str | None = "13.0", driver: Any = (0, 2), **environment: str) -> Health:
        monkeypatch.setattr(machine, "_smi", smi)
        monkeypatch.setattr(toolchain, "torch_cuda", lambda: cuda)
        return examine(Place(smi=smi, driver=lambda: driver, environment=environment))

    return look


def named(found: Health, name: str) -> HealthFinding:
    return next(one for one in found.findings if one.name == name)


def test_this_machine_is_looked_at_in_seconds_and_without_torch() -> None:
    code = (
        "import sys, json; from memfit import doctor; h = doctor(); "
        "print(json.dumps([h.to_json(), [m for m in ('torch', 'transformers', 'deepspeed') if m in sys.modules]]))"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 30  # 1 s on an idle machine; its own clock says how long the looking took
    value, heavy = json.loads(done.stdout)
    assert heavy == []
    assert value["seconds"] < 5
    assert value["verdict"] in ("ok", "warn")
    names = {row["name"] for row in value["findings"]}
    assert {"python", "torch", "transformers", "peft", "driver", "compiler", "nvcc", "memlock", "/dev/shm"} <= names
    assert {"run folder", "cache", "host memory", "cpus", "liger-kernel", "flash-attn", "bitsandbytes"} <= names
    assert all(row["fix"] for row in value["findings"] if row["status"] != "ok")
    assert all(row["status"] in ("ok", "warn", "fail") and row["found"] for row in value["findings"])


def test_cards_and_who_holds_them(two_cards: Callable[..., Health]) -> None:
    found = two_cards()
    assert named(found, "driver").found == "580.82.07, runs CUDA up to 13.0"
    assert named(found, "gpus").value == 2
    assert named(found, "torch on gpu").status == "ok"
    held = named(found, "gpu 0")
    assert (held.status, held.value) == ("warn", 9000 << 20)
    assert "4711 python3 8990 MiB" in held.found
    assert named(found, "gpu 1").status == "ok"


def test_hidden_cards(two_cards: Callable[..., Health]) -> None:
    assert "1 hidden" in named(two_cards(CUDA_VISIBLE_DEVICES="1"), "gpus").found
    none = named(two_cards(CUDA_VISIBLE_DEVICES=""), "gpus")
    assert (none.status, none.value, none.fix) == ("warn", 0, "unset CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("cuda", "driver", "status", "words"),
    [
        ("13.0", (0, 2), "ok", "opens 2 devices"),
        (None, (0, 2), "fail", "is a CPU build"),
        ("14.1", (0, 2), "fail", "needs a newer driver"),
        ("13.0", (802, 0), "fail", "error 802"),
        ("13.0", None, "warn", "could not be asked"),
    ],
)
def test_whether_torch_can_use_the_cards(
    two_cards: Callable[..., Health], cuda: str | None, driver: Any, status: str, words: str
) -> None:
    found = two_cards(cuda, driver)
    row = named(found, "torch on gpu")
    assert row.status == status
    assert words in row.found
    assert (found.verdict == "fail") == (status == "fail")
    assert bool(row.fix) == (status != "ok")


def test_a_driver_without_its_tool_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_smi", lambda *words: None)
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM version: 580")
    row = named(examine(Place(root=tmp_path)), "driver")
    assert row.status == "fail"
    assert "--gpus all" in row.fix
    assert named(examine(Place(root=tmp_path / "elsewhere")), "driver").status == "ok"


def test_a_containers_limits(tmp_path: Path) -> None:
    for path, text in {
        "proc/meminfo": "MemTotal:       263856016 kB\nMemAvailable:   200000000 kB\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": str(4 << 30),
        "sys/fs/cgroup/cpu.max": "100000 100000",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = examine(Place(root=tmp_path))
    memory = named(found, "host memory")
    assert (memory.status, memory.value) == ("warn", 4 << 30)
    assert "by the container's limit" in memory.found
    assert (named(found, "cpus").status, named(found, "cpus").value) == ("warn", 1)
    assert named(found, "/dev/shm").status == "warn"  # this root has none


def test_small_and_closed_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "disk_free_bytes", lambda path: 50 << 20)
    found = examine(Place(runs=tmp_path / "runs"))
    assert (named(found, "run folder").status, found.verdict) == ("fail", "fail")
    assert named(found, "cache").status == "warn"
    assert "--shm-size" in named(found, "/dev/shm").fix
    monkeypatch.setattr(machine, "disk_free_bytes", lambda path: 5 << 30)
    assert named(examine(Place(runs=tmp_path / "runs")), "run folder").status == "warn"
    monkeypatch.setattr(health.os, "access", lambda path, mode: False)
    closed = named(examine(Place(runs=tmp_path / "runs")), "run folder")
    assert (closed.status, closed.fix) == ("fail", "set run.folder to a place you own")


def test_page_locked_memory_matters_with_a_gpu_only(
    two_cards: Callable[..., Health], monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 << 20, 8 << 20))
    row = named(two_cards(), "memlock")
    assert (row.status, row.value) == ("warn", 8 << 20)
    assert "ulimit -l unlimited" in row.fix
    monkeypatch.setattr(machine, "_smi", lambda *words: None)
    assert named(examine(), "memlock").status == "ok"


def tools(**changed: Any) -> Toolchain:
    usual: dict[str, Any] = {
        "compiler": "/usr/bin/c++",
        "compiler_problem": None,
        "ninja": "/usr/bin/ninja",
        "nvcc": "12.4",
        "torch_cuda": "13.0",
        "needs_nvcc": False,
        "folder": Path("/nowhere"),
        "built": (),
    }
    return Toolchain(**{**usual, **changed})


@pytest.mark.parametrize(
    ("changed", "problem", "hint"),
    [
        ({}, None, ""),
        ({"compiler": None}, "no C++ compiler", "g++"),
        ({"compiler_problem": "omp.h: No such file"}, "cannot compile: omp.h", "python3-dev"),
        ({"ninja": None}, "ninja is not installed", "pip install ninja"),
        ({"needs_nvcc": True}, "nvcc is of CUDA 12.4, torch of CUDA 13.0", "CUDA 13's nvcc"),
        ({"needs_nvcc": True, "nvcc": ""}, "no nvcc of CUDA 13.0", "CUDA 13's nvcc"),
        ({"needs_nvcc": True, "nvcc": "13.1"}, None, ""),
        ({"needs_nvcc": True, "torch_cuda": None, "nvcc": ""}, None, ""),
    ],
)
def test_what_compiling_takes(changed: dict[str, Any], problem: str | None, hint: str) -> None:
    found = tools(**changed)
    assert (found.problem() is None) == (problem is None)
    if problem is not None:
        assert problem in (found.problem() or "")
        assert hint in found.hint()


def test_a_compiler_that_cannot_compile_is_found_out(tmp_path: Path) -> None:
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\necho 'probe.cpp:2:10: fatal error: omp.h: No such file or directory' >&2\nexit 1\n")
    fake.chmod(0o755)
    found = find_toolchain({"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert "omp.h" in (found.compiler_problem or "")
    assert "cannot compile" in (found.problem() or "")
    fake.unlink()
    assert "no C++ compiler" in (find_toolchain({"PATH": str(tmp_path)}).problem() or "")


def test_what_lies_ready_is_no_one_elses_and_not_half_done(tmp_path: Path) -> None:
    place = tmp_path / "cpu_adam"
    place.mkdir()
    (place / "cpu_adam.so").touch()
    assert not is_built(tmp_path, "cpu_adam")
    (place / "build.ninja").write_text("cflags = -I/another/environment")
    assert not is_built(tmp_path, "cpu_adam")
    (place / "build.ninja").write_text(f"cflags = -I{sys.prefix}/include")
    assert is_built(tmp_path, "cpu_adam")
    assert not is_built(tmp_path, "cpu_adam", ninja="/bin/false")
    (place / "lock").touch()
    assert not is_built(tmp_path, "cpu_adam")
    assert find_toolchain({"PATH": "", "TORCH_EXTENSIONS_DIR": str(tmp_path)}).locks == (place / "lock",)


def test_a_lock_is_live_while_somebody_compiles_behind_it(tmp_path: Path) -> None:
    place, processes = tmp_path / "cpu_adam", tmp_path / "proc"
    place.mkdir()
    (processes / "1").mkdir(parents=True)
    (processes / "1" / "cwd").symlink_to(tmp_path)
    lock = place / "lock"
    assert not is_live(lock, processes)  # gone
    lock.touch()
    assert is_live(lock, processes)  # quite new
    os.utime(lock, (1, 1))
    assert not is_live(lock, processes)
    (processes / "22").mkdir()
    (processes / "22" / "cwd").symlink_to(place)
    assert is_live(lock, processes)
