"""What the driver says of GPUs beside their names: memory in use, PCIe, and how they are joined.

Text in, numbers out. `Ask` runs nvidia-smi with some arguments and returns what it prints, None when that fails.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from memfit.units import MIB

Ask = Callable[..., str | None]

_FIELDS = ("index", "uuid", "memory.used", "pcie.link.gen.max", "pcie.link.width.max")


@dataclass(frozen=True)
class GpuState:
    """One GPU now. `held_bytes`: what processes and the desktop hold on it, this process excepted.

    `pcie_generation` and `pcie_lanes` are the most that card and slot can do together; None where the driver is silent.
    """

    held_bytes: int
    pcie_generation: int | None
    pcie_lanes: int | None


def gpu_states(ask: Ask, own_pid: int | None = None) -> dict[int, GpuState]:
    """The state of every GPU by its index; empty where the driver cannot be asked or answers in another form."""
    text = ask(f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in row] for row in csv.reader((text or "").splitlines()) if row]
    if not rows or any(len(row) != len(_FIELDS) or not row[0].isdigit() for row in rows):
        return {}
    own = _own_bytes(ask, os.getpid() if own_pid is None else own_pid)
    states = {}
    for index, uuid, used, generation, lanes in rows:
        held = (_whole(used) or 0) * MIB - own.get(uuid, 0)
        states[int(index)] = GpuState(max(0, held), _whole(generation), _whole(lanes))
    return states


def held_by_process(ask: Ask, own_pid: int | None = None) -> int:
    """What this process holds on all GPUs; 0 where the driver does not see it, as in some containers."""
    return sum(_own_bytes(ask, os.getpid() if own_pid is None else own_pid).values())


def _own_bytes(ask: Ask, pid: int) -> dict[str, int]:
    """What this process holds, by the GPU's UUID. In a container the driver may not see the process: then nothing."""
    text = ask("--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader,nounits")
    found: dict[str, int] = {}
    for row in csv.reader((text or "").splitlines()):
        cells = [cell.strip() for cell in row]
        if len(cells) == 3 and cells[1] == str(pid):
            found[cells[0]] = found.get(cells[0], 0) + (_whole(cells[2]) or 0) * MIB
    return found


def links_between(ask: Ask, indices: Sequence[int]) -> str:
    """How these GPUs are joined: "nvlink" when every pair is, "pcie" when every pair can copy directly, else "host".

    Empty for a single GPU, and where the driver does not say.
    """
    if len(indices) < 2:
        return ""
    wires = _matrix(ask("topo", "-m") or "")
    pairs = [(one, other) for one in indices for other in indices if one != other]
    if not wires or any(pair not in wires for pair in pairs):
        return ""
    if all(re.fullmatch(r"NV\d+", wires[pair]) for pair in pairs):
        return "nvlink"
    peers = _matrix(ask("topo", "-p2p", "r") or "")
    if any(pair not in peers for pair in pairs):
        return ""
    return "pcie" if all(peers[pair] == "OK" for pair in pairs) else "host"


def _matrix(text: str) -> Mapping[tuple[int, int], str]:
    """The cells of a table that nvidia-smi topo prints, by (row, column) of GPUs."""
    cells: dict[tuple[int, int], str] = {}
    columns: list[int] = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        words = line.split()
        if not columns and len(words) > 1 and all(re.fullmatch(r"GPU\d+", word) for word in words[:2]):
            columns = [int(word[3:]) for word in words if re.fullmatch(r"GPU\d+", word)]
        elif columns and words and re.fullmatch(r"GPU\d+", words[0]):
            row = int(words[0][3:])
            cells |= {(row, column): word for column, word in zip(columns, words[1:], strict=False)}
    return cells


def _whole(text: str) -> int | None:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else None
