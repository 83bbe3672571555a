"""What this machine has, without torch: GPUs by the driver's own tool, CPUs and memory as the container limits them.

`torch_gpu_problem` judges facts about torch that are gathered below the torch line.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from memfit.catalog.gpus import GPUS, NOMINAL_SHARE
from memfit.catalog.links import PCIE_LANE_RATE
from memfit.catalog.torch_builds import TORCH_BUILDS, TorchBuild
from memfit.errors import UserError
from memfit.inputs.gpu_state import GpuState, gpu_states, held_by_process, links_between
from memfit.specs.hardware import GpuLink, GpuRow, Hardware
from memfit.units import GIB, MIB

# A driver that does not answer in this time is taken for absent; a first call may have to wake the GPUs.
SMI_SECONDS = 20.0
BF16_CAPABILITY = 8.0
# What makers and boards add to a chip's name.
_BOARD = re.compile(r"\b(NVIDIA|GeForce|Tesla|Quadro|PCIe|PCI|SXM\d*|HBM\d\w*|NVL|\d+\s?GB)\b", re.IGNORECASE)
# What others hold is counted in such steps, rounded up: a forecast should not change with every window of a desktop.
HELD_STEP = 64 * MIB
# A row stands for a GPU if the driver's total lies within this share of its nominal size.
SIZE_TOLERANCE = 0.08


@dataclass(frozen=True)
class DetectedGpu:
    """One GPU as its driver reports it. `cuda_version`: the newest CUDA that the driver runs, "" if it does not say."""

    index: int
    name: str
    memory_bytes: int
    driver: str
    compute_capability: str
    cuda_version: str
    uuid: str = ""


@dataclass(frozen=True)
class TorchFacts:
    """What a torch build says of itself. `cuda_version` is None for a build without CUDA; `arch_list` as sm_80."""

    version: str
    cuda_version: str | None
    arch_list: tuple[str, ...]
    is_available: bool
    error: str | None = None


def detect(root: Path = Path("/")) -> Hardware:
    """This machine: its visible GPUs, or one CPU rank when there are none.

    Raises UserError when the visible GPUs are of several kinds, because one row must stand for all.
    """
    gpus = detected_gpus()
    host = host_memory_bytes(root)
    if not gpus:
        return Hardware(gpu=None, gpus_per_node=1, host_memory_bytes=host, detected=True)
    states = gpu_states(_smi)
    rows = [gpu_row(gpu) for gpu in gpus]
    if len({row.name for row in rows}) > 1:
        kinds = ", ".join(f"{gpu.index}: {gpu.name}" for gpu in gpus)
        raise UserError(
            f"this machine has GPUs of several kinds ({kinds})",
            f"choose those of one kind, for example CUDA_VISIBLE_DEVICES={gpus[0].index}",
        )
    seen = [states[gpu.index] for gpu in gpus if gpu.index in states]
    held = -(-max((state.held_bytes for state in seen), default=0) // HELD_STEP) * HELD_STEP
    return Hardware(
        gpu=_without(_as_wired(rows[0], seen), held),
        gpus_per_node=len(rows),
        host_memory_bytes=host,
        detected=True,
        held_bytes=held,
        links=links_between(_smi, [gpu.index for gpu in gpus]),
    )


def _without(row: GpuRow, held: int) -> GpuRow:
    """The row with what is left of its memory beside what others hold."""
    if not held:
        return row
    source = f"{row.source}; less {held // MIB} MiB that other processes or a desktop hold"
    return dataclasses.replace(row, capacity_bytes=max(0, row.capacity_bytes - held), source=source)


def _as_wired(row: GpuRow, seen: Sequence[GpuState]) -> GpuRow:
    """The row with the PCIe of this machine's worst slot, where that is known and differs."""
    generations = [state.pcie_generation for state in seen if state.pcie_generation in PCIE_LANE_RATE]
    lanes = [state.pcie_lanes for state in seen if state.pcie_lanes]
    if not generations or not lanes:
        return row
    link = row.link or GpuLink(0, 0, peer=False)
    found = dataclasses.replace(link, pcie_generation=min(generations), pcie_lanes=min(lanes))
    if found == link:
        return row
    found = dataclasses.replace(found, verified="detected", source="nvidia-smi: pcie.link.gen.max, pcie.link.width.max")
    return dataclasses.replace(row, link=found)


def detected_gpus(environment: Mapping[str, str] | None = None) -> tuple[DetectedGpu, ...]:
    """The GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves visible. Empty without a driver."""
    fields = ["index", "name", "memory.total", "driver_version", "uuid", "compute_cap"]
    rows = _query(fields)
    if rows is None:
        # Drivers before 510 do not know compute_cap.
        fields, rows = fields[:-1], _query(fields[:-1])
    if not rows or rows[0][0].startswith("No devices"):
        return ()
    cuda = _driver_cuda()
    found = []
    for row in rows:
        if len(row) != len(fields) or not row[0].isdigit():
            # Taken for no GPU, this would become a silent run on the CPU.
            raise UserError(
                f"nvidia-smi answers with something that cannot be read: {', '.join(row)[:100]!r}",
                "mend the driver until nvidia-smi lists the GPUs, or say what to use: --gpus 1xRTX3090, --gpus 1xcpu",
            )
        values = dict(zip(fields, row, strict=True))
        memory = re.match(r"[0-9]+", values["memory.total"])
        if memory is None:  # "[N/A]" where CPU and GPU share memory
            continue
        found.append(
            DetectedGpu(
                index=int(values["index"]),
                name=values["name"],
                memory_bytes=int(memory[0]) * MIB,
                driver=values["driver_version"],
                compute_capability=values.get("compute_cap", ""),
                cuda_version=cuda,
                uuid=values["uuid"],
            )
        )
    return _visible(found, os.environ if environment is None else environment)


def gpu_row(gpu: DetectedGpu) -> GpuRow:
    """The catalogue's row for a GPU, or one made from what the driver reports, marked "detected"."""
    for chip in _chips(gpu.name):
        rows = [row for row in GPUS if row.chip.upper() == chip and _size_off(row, gpu) <= SIZE_TOLERANCE]
        if rows:
            return min(rows, key=lambda row: _size_off(row, gpu))
    capability = gpu.compute_capability
    return GpuRow(
        name=re.sub(r"NVIDIA|GeForce|Tesla|[^A-Za-z0-9.-]", "", gpu.name) or "GPU",
        chip=chip,
        nominal_gib=round(gpu.memory_bytes / GIB),
        capacity_bytes=int(NOMINAL_SHARE * gpu.memory_bytes),
        compute_capability=capability,
        has_bf16=_number(capability) >= BF16_CAPABILITY,
        verified="detected",
        source=f"{NOMINAL_SHARE} of the {gpu.memory_bytes // MIB} MiB that driver {gpu.driver} reports for {gpu.name}",
    )


def _chips(name: str) -> list[str]:
    """What a driver's name may stand for: the chip on its board, where that has a row of its own, and the bare chip."""
    spaced = name.replace("-", " ")
    bare = re.sub(r"[\s_-]", "", _BOARD.sub("", spaced)).upper()
    return [f"{bare}PCIE", bare] if re.search(r"\bPCIe\b", spaced, re.IGNORECASE) else [bare]


def _size_off(row: GpuRow, gpu: DetectedGpu) -> float:
    """How far the driver's total is from the row's nominal size, as a share of that."""
    return abs(gpu.memory_bytes - row.nominal_gib * GIB) / (row.nominal_gib * GIB)


def torch_gpu_problem(facts: TorchFacts, gpus: Sequence[DetectedGpu]) -> UserError | None:
    """Why this build of torch cannot use the GPUs that are there, with the install line that can; None if it can.

    Never a silent run on the CPU: what the driver lists must be usable by torch.
    """
    if not gpus:
        return None
    gpu = next((one for one in gpus if not _covers(facts.arch_list, one.compute_capability)), gpus[0])
    has = f"{gpu.name}, driver {gpu.driver}" + (f" (CUDA {gpu.cuda_version})" if gpu.cuda_version else "")
    if facts.cuda_version is None:
        return UserError(f"torch {facts.version} is a CPU build, but there is a {has}", _install(facts, gpu))
    build = f"torch {facts.version} (CUDA {facts.cuda_version})"
    if facts.is_available:
        if _covers(facts.arch_list, gpu.compute_capability):
            return None
        return UserError(
            f"{build} has no kernels for compute capability {gpu.compute_capability} of the {has}; "
            f"it has {', '.join(facts.arch_list)}",
            _install(facts, gpu),
        )
    if gpu.cuda_version and _major(facts.cuda_version) > _major(gpu.cuda_version):
        return UserError(f"{build} needs a newer driver than that of the {has}", _install(facts, gpu))
    reason = f": {facts.error}" if facts.error else ""
    return UserError(
        f"{build} cannot use the {has}{reason}",
        "run nvidia-smi: it must list the GPU (a driver that was updated needs a reboot); "
        f"or install torch again: {_install(facts, gpu)}",
    )


def cpu_count(root: Path = Path("/")) -> int:
    """CPUs that this process may use: its affinity, within the container's quota (at least 1)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quotas = []
    for folder in _cgroups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")  # version 2: "150000 100000" or "max 100000"
        if not quota:  # version 1
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(max(1, int(quota) // int(period)))
    return min([count, *quotas])


def host_memory_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process may use: the machine's, or the lowest limit of its control groups (version 1 or 2)."""
    limits = []
    total = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    if total:
        limits.append(int(total[1]) * 1024)
    for folder in _cgroups(root, "memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text.isdigit():
                limits.append(int(text))
    return min(limits, default=None)


def disk_free_bytes(path: Path) -> int | None:
    """Free bytes where `path` is or would be; None when that cannot be told."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def disk_kind(path: Path, root: Path = Path("/")) -> str:
    """ "nvme", "ssd" or "disk" of the device under `path`; "" where the kernel does not tell (network, overlay)."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        number = os.stat(place).st_dev
        device = (root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    except OSError:
        return ""
    if re.search(r"/nvme\d", str(device)):
        return "nvme"
    for folder in (device, device.parent):  # a partition stands below its disk
        rotates = _read(folder / "queue/rotational")
        if rotates:
            return "disk" if rotates == "1" else "ssd"
    return ""


def _query(fields: Sequence[str]) -> list[list[str]] | None:
    """The rows of one nvidia-smi query; None when it fails or is not there."""
    text = _smi(f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    if text is None:
        return None
    return [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]


def _driver_cuda() -> str:
    """The newest CUDA that the driver runs: nvidia-smi prints it in its header only."""
    match = re.search(r"CUDA (?:UMD )?Version:\s*([0-9]+\.[0-9]+)", _smi() or "")
    return match[1] if match else ""


def own_gpu_bytes() -> int:
    """What this process holds on all GPUs, as the driver tells it; 0 where it does not say."""
    return held_by_process(_smi)


def _smi(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SMI_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _visible(gpus: Sequence[DetectedGpu], environment: Mapping[str, str]) -> tuple[DetectedGpu, ...]:
    """As CUDA reads CUDA_VISIBLE_DEVICES: indices or the beginnings of UUIDs, up to the first that is no GPU."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return tuple(gpus)
    seen = []
    for word in map(str.strip, chosen.split(",")):
        found = next(
            (
                g
                for g in gpus
                if word and (word == str(g.index) or (word.startswith("GPU-") and g.uuid.startswith(word)))
            ),
            None,
        )
        if found is None:
            break
        seen.append(found)
    return tuple(seen)


def _cgroups(root: Path, controller: str) -> list[Path]:
    """The process's control groups of one controller, from its own up to the root of the tree."""
    base = root / "sys/fs/cgroup"
    folders = [base, base / controller]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        place = (base / controller if controllers else base) / path.lstrip("/")
        while place != base and base in place.parents:
            folders.append(place)
            place = place.parent
    return folders


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def _covers(architectures: Sequence[str], capability: str) -> bool:
    """Whether kernels for these architectures run: the same major version and a minor not above, or PTX from below."""
    if not capability or not architectures:
        return True
    wanted = tuple(map(int, capability.split(".")))
    for name in architectures:
        match = re.match(r"(sm|compute)_(\d+)(\d)[a-z]?$", name)
        if match is None:
            continue
        have = (int(match[2]), int(match[3]))
        if have <= wanted and (match[1] == "compute" or have[0] == wanted[0]):
            return True
    return False


def _install(facts: TorchFacts, gpu: DetectedGpu) -> str:
    """The install line of a build that this driver and this GPU can run, or what must change for there to be one."""
    version = facts.version.partition("+")[0]
    offered = [build for build in TORCH_BUILDS if build.is_for(version)] or [TORCH_BUILDS[-1]]
    fitting = [b for b in offered if _driver_runs(b, gpu) and b.has_kernels(_number(gpu.compute_capability))]
    if fitting:
        tag = fitting[-1].tag
        return f"pip install torch=={version} --index-url https://download.pytorch.org/whl/{tag}"
    with_kernels = [build for build in offered if build.has_kernels(_number(gpu.compute_capability))]
    if with_kernels:
        least = with_kernels[0]
        return (
            f"update the driver to {least.min_driver} or newer, then "
            f"pip install torch=={version} --index-url https://download.pytorch.org/whl/{least.tag}"
        )
    return f"torch {version} has no build for compute capability {gpu.compute_capability}; run with --gpus 1xcpu"


def _driver_runs(build: TorchBuild, gpu: DetectedGpu) -> bool:
    return _driver(gpu.driver) >= _driver(build.min_driver)


def _driver(text: str) -> tuple[int, ...]:
    return tuple(int(piece) for piece in re.findall(r"\d+", text))


def _major(version: str) -> int:
    return int(version.partition(".")[0] or 0)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
