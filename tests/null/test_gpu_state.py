"""What the driver says of memory in use and of links, from recorded answers."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from memfit.catalog.gpus import find_gpu
from memfit.inputs import machine
from memfit.inputs.gpu_state import GpuState, gpu_states, links_between
from memfit.units import MIB

STATES = """\
0, GPU-aaa, 1187, 4, 16
1, GPU-bbb, 4, 3, 8
"""
APPS = """\
GPU-aaa, 4242, 912
GPU-aaa, 77, 250
GPU-bbb, 77, [N/A]
"""
NVLINK = """\
\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity
\x1b[4mGPU0\x1b[0m\t X \tNV12\tPXB\t0-31\t0
GPU1\tNV12\t X \tPXB\t0-31\t0
NIC0\tPXB\tPXB\t X
Legend:
  X    = Self
"""
BRIDGED_PAIRS = """\
        GPU0    GPU1    GPU2    GPU3    CPU Affinity
GPU0     X      NV4     PHB     PHB     0-63
GPU1    NV4      X      PHB     PHB     0-63
GPU2    PHB     PHB      X      NV4     0-63
GPU3    PHB     PHB     NV4      X      0-63
"""
PLAIN = "\tGPU0\tGPU1\nGPU0\t X \tPHB\nGPU1\tPHB\t X \n"
PEERS = "\tGPU0\tGPU1\nGPU0\t X \tOK\nGPU1\tOK\t X \n"
NO_PEERS = " \tGPU0\tGPU1\t\n GPU0\tX\tCNS\t\n GPU1\tCNS\tX\t\n"


def asked(answers: dict[str, str | None]):  # type: ignore[no-untyped-def]
    def ask(*arguments: str) -> str | None:
        text = " ".join(arguments)
        return next((answer for key, answer in answers.items() if text.startswith(key)), None)

    return ask


def test_held_memory_without_this_process() -> None:
    ask = asked({"--query-gpu": STATES, "--query-compute-apps": APPS})
    assert gpu_states(ask, own_pid=4242) == {
        0: GpuState((1187 - 912) * MIB, 4, 16),
        1: GpuState(4 * MIB, 3, 8),
    }
    assert gpu_states(ask, own_pid=1)[0].held_bytes == 1187 * MIB


@pytest.mark.parametrize("text", [None, "", "0, GPU-a, 5", "No devices were found", "x, GPU-a, 1, 4, 16"])
def test_a_driver_that_answers_otherwise_gives_nothing(text: str | None) -> None:
    assert gpu_states(asked({"--query-gpu": text})) == {}


def test_figures_that_the_driver_withholds() -> None:
    ask = asked({"--query-gpu": "0, GPU-a, [N/A], [N/A], [N/A]"})
    assert gpu_states(ask) == {0: GpuState(0, None, None)}


@pytest.mark.parametrize(
    ("wires", "peers", "indices", "expected"),
    [
        (NVLINK, None, [0, 1], "nvlink"),
        (NVLINK, None, [0], ""),
        (BRIDGED_PAIRS, None, [0, 1], "nvlink"),
        (BRIDGED_PAIRS, None, [0, 1, 2, 3], ""),
        (PLAIN, PEERS, [0, 1], "pcie"),
        (PLAIN, NO_PEERS, [0, 1], "host"),
        (PLAIN, None, [0, 1], ""),
        (None, PEERS, [0, 1], ""),
        (PLAIN, PEERS, [0, 5], ""),
    ],
)
def test_links(wires: str | None, peers: str | None, indices: list[int], expected: str) -> None:
    assert links_between(asked({"topo -m": wires, "topo -p2p": peers}), indices) == expected


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi with two 3090s, the second in a PCIe 3 x8 slot and the first with a desktop on it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    answers = {
        "index,name": "0, NVIDIA GeForce RTX 3090, 24576, 550.163.01, GPU-aaa, 8.6\n"
        "1, NVIDIA GeForce RTX 3090, 24576, 550.163.01, GPU-bbb, 8.6\n",
        "index,uuid": STATES,
        "apps": "",
        "topo-m": PLAIN,
        "topo-p2p": NO_PEERS,
    }
    for name, text in answers.items():
        (folder / name).write_text(text)
    script = folder / "nvidia-smi"
    cases = (
        ("--query-gpu=index,name*", "index,name"),
        ("--query-gpu=index,uuid*", "index,uuid"),
        ("--query-compute-apps*", "apps"),
        ("topo\\ -m*", "topo-m"),
        ("topo\\ -p2p*", "topo-p2p"),
    )
    lines = "\n".join(f'{key}) while read -r line; do echo "$line"; done < "{folder}/{file}";;' for key, file in cases)
    script.write_text(f'#!/bin/sh\ncase "$*" in\n{lines}\n*) exit 0;;\nesac\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def test_this_machine_as_it_is_now(driver: Path) -> None:
    found = machine.detect()
    assert found.gpu is not None
    held = 19 * 64 * MIB  # 1187 MiB, rounded up
    assert (found.text, found.links, found.held_bytes) == ("2xRTX3090", "host", held)
    assert found.gpu.capacity_bytes == find_gpu("RTX3090").capacity_bytes - held
    assert "less 1216 MiB" in found.gpu.source
    assert found.gpu.link is not None
    assert (found.gpu.link.pcie_generation, found.gpu.link.pcie_lanes) == (3, 8)
    assert found.gpu.link.verified == "detected"


def test_only_visible_cards_count(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = machine.detect()
    assert (found.text, found.links, found.held_bytes) == ("1xRTX3090", "", 64 * MIB)


def test_the_kind_of_a_disk(tmp_path: Path) -> None:
    import os

    number = os.stat(tmp_path).st_dev
    block = tmp_path / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    assert machine.disk_kind(tmp_path, tmp_path) == ""
    for name, rotates, expected in (("nvme0n1", "0", "nvme"), ("sda", "0", "ssd"), ("sdb", "1", "disk")):
        device = tmp_path / f"sys/devices/{name}/{name}1"
        (device.parent / "queue").mkdir(parents=True)
        (device.parent / "queue/rotational").write_text(rotates)
        device.mkdir()
        block.parent.mkdir(parents=True, exist_ok=True)
        block.unlink(missing_ok=True)
        block.symlink_to(device)
        assert machine.disk_kind(tmp_path / "not/there", tmp_path) == expected
