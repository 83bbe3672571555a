"""This machine's health for training: what is missing, tight or in use, each with its fix. Imports no torch."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from memfit.errors import UserError
from memfit.inputs import machine
from memfit.inputs.cache import cache_folder
from memfit.inputs.gpu_state import Ask, gpu_states
from memfit.inputs.machine import DetectedGpu, TorchFacts
from memfit.inputs.toolchain import CPU_ADAM, Toolchain, find_toolchain, is_live, version_of
from memfit.specs.health import Health, HealthFinding, Status
from memfit.units import GIB, MIB, gib

# Below these something usually breaks. Docker gives 64 MiB of /dev/shm, where loader workers hand batches over; a
# checkpoint of an 8 B model with its optimizer is about 100 GiB, a run of the smallest models some MiB.
SHM_BYTES, DISK_WARN, DISK_FAIL = GIB, 20 * GIB, 100 * MIB
HOST_BYTES = 8 * GIB
HELD_BYTES = 512 * MIB  # a desktop holds that much
MEMLOCK_BYTES = 64 * MIB  # page-locked buffers of networks and of DeepSpeed's disk engine count against it
DRIVER_SECONDS = 10.0
# What each optional package is for.
OPTIONAL = {
    "deepspeed": "levers.parallel: zero1 to zero3",
    "bitsandbytes": "method: qlora and 8-bit optimizers",
    "flash-attn": "levers.attention: flash",
    "flash-linear-attention": "levers.linear_attention: fla",
    "liger-kernel": "levers.loss: fused",
}
# Asks the driver itself in a process of its own: a driver that hangs or fails then takes nothing with it.
# Source: CUDA Driver API, cuInit and cuDeviceGetCount.
ASK_DRIVER = """
import ctypes
cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
code = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
print(code, count.value)
"""


@dataclass(frozen=True)
class Place:
    """Where to look: the root of the file system, the run folder, and how to ask nvidia-smi and the driver."""

    root: Path = Path("/")
    runs: Path = Path("runs")
    smi: Ask = machine._smi
    driver: Callable[[], tuple[int, int] | None] | None = None
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))


def examine(place: Place | None = None) -> Health:
    """Look at everything once; a few seconds at most."""
    began, place = time.monotonic(), place or Place()
    tools = find_toolchain(place.environment)
    found = [_python(), *_torch(tools), *_packages(), *_gpus(place, tools), *_compiling(tools)]
    has_gpu = any(one.name == "gpus" for one in found)
    found += [_memlock(has_gpu), _shared_memory(place.root), *_disks(place), *_limits(place.root)]
    return Health(tuple(found), round(time.monotonic() - began, 2))


def _python() -> HealthFinding:
    version = sys.version.split()[0]
    fine = sys.version_info >= (3, 11)
    return HealthFinding(
        "python", "ok" if fine else "fail", version, "" if fine else "use Python 3.11 or newer", version
    )


def _torch(tools: Toolchain) -> Iterator[HealthFinding]:
    version = version_of("torch")
    if version is None:
        yield HealthFinding("torch", "fail", "not installed", "pip install memfit")
        return
    build = f"built with CUDA {tools.torch_cuda}" if tools.torch_cuda else "a CPU build"
    yield _versioned("torch", version, f"{version}, {build}")
    if tools.torch_cuda:
        major = tools.torch_cuda.partition(".")[0]
        nccl = version_of(f"nvidia-nccl-cu{major}")
        words = f"{nccl}" if nccl else f"no package nvidia-nccl-cu{major}: torch brings its own, or has none"
        yield HealthFinding(
            "nccl", "ok", words, "" if nccl else "several GPUs: install torch from PyTorch's index", nccl
        )


def _packages() -> Iterator[HealthFinding]:
    for name in ("transformers", "peft", "accelerate", "safetensors"):
        version = version_of(name)
        if version is None:
            yield HealthFinding(name, "fail", "not installed", "pip install memfit")
        else:
            yield _versioned(name, version, version)
    for name, purpose in OPTIONAL.items():
        version = version_of(name)
        words = version or f"not installed; only for {purpose}"
        yield HealthFinding(name, "ok", words, "" if version else f"if wanted: pip install {name}", version)


def _versioned(name: str, version: str, words: str) -> HealthFinding:
    """A required package against the least version that memfit asks for."""
    least = _least().get(name)
    if least and _numbers(version) < _numbers(least):
        return HealthFinding(
            name, "fail", f"{words}, and memfit needs {least}", f"pip install '{name}>={least}'", version
        )
    return HealthFinding(name, "ok", words, value=version)


def _least() -> dict[str, str]:
    try:
        wanted = importlib.metadata.requires("memfit") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    pairs = (re.match(r"^([A-Za-z0-9._-]+)\s*>=\s*([0-9.]+)", line) for line in wanted)
    return {pair[1]: pair[2] for pair in pairs if pair}


def _gpus(place: Place, tools: Toolchain) -> Iterator[HealthFinding]:
    try:
        every = machine.detected_gpus({})
        gpus = machine.detected_gpus(place.environment)
    except UserError as error:
        yield HealthFinding("driver", "fail", error.problem, error.hint)
        return
    if not every:
        there = (place.root / "proc/driver/nvidia/version").exists() or (place.root / "dev/nvidia0").exists()
        if there:
            fix = "put nvidia-smi on the PATH; in a container, start it with --gpus all; after an update, reboot"
            yield HealthFinding("driver", "fail", "a driver is loaded, and nvidia-smi does not answer", fix)
        else:
            yield HealthFinding("driver", "ok", "no GPU: training runs on the CPU")
        return
    first = every[0]
    cuda = f", runs CUDA up to {first.cuda_version}" if first.cuda_version else ""
    yield HealthFinding("driver", "ok", f"{first.driver}{cuda}", value=first.driver)
    if not gpus:
        shown = place.environment.get("CUDA_VISIBLE_DEVICES", "")
        words = f"{len(every)} there, none visible: CUDA_VISIBLE_DEVICES={shown!r}"
        yield HealthFinding("gpus", "warn", words, "unset CUDA_VISIBLE_DEVICES", 0)
        return
    hidden = f", {len(every) - len(gpus)} hidden by CUDA_VISIBLE_DEVICES" if len(gpus) < len(every) else ""
    names = ", ".join(f"{gpu.index}: {gpu.name} {gib(gpu.memory_bytes)}" for gpu in gpus)
    mixed = len({gpu.name for gpu in gpus}) > 1
    fix = f"one kind at a time, such as CUDA_VISIBLE_DEVICES={gpus[0].index}" if mixed else ""
    yield HealthFinding("gpus", "warn" if mixed else "ok", names + hidden, fix, len(gpus))
    yield _usable(place, tools, gpus)
    yield from _held(place.smi, gpus)


def _usable(place: Place, tools: Toolchain, gpus: tuple[DetectedGpu, ...]) -> HealthFinding:
    """Whether this torch can run on these GPUs: by its build, the driver's age, and the driver's own word."""
    version = version_of("torch") or ""
    driver, cuda = gpus[0].cuda_version, tools.torch_cuda or None
    old = bool(cuda and driver and int(cuda.partition(".")[0]) > int(driver.partition(".")[0]))
    problem = machine.torch_gpu_problem(TorchFacts(version, cuda, (), not old), gpus) if version else None
    if problem is not None:
        return HealthFinding("torch on gpu", "fail", problem.problem, problem.hint)
    answer = (place.driver or ask_driver)()
    if answer is None:
        return HealthFinding(
            "torch on gpu", "warn", "the driver's library could not be asked", "see that libcuda.so.1 loads"
        )
    code, count = answer
    if code:
        fix = "run nvidia-smi; after an update reboot; for code 802 start nvidia-fabricmanager"
        return HealthFinding("torch on gpu", "fail", f"the driver answers cuInit with error {code}", fix, code)
    return HealthFinding("torch on gpu", "ok", f"the driver opens {count} device{'s' * (count != 1)}", value=count)


def ask_driver() -> tuple[int, int] | None:
    """(error code, number of devices) of CUDA's driver; None when it cannot be asked."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK_DRIVER], capture_output=True, text=True, timeout=DRIVER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = done.stdout.split()
    return (int(words[0]), int(words[1])) if done.returncode == 0 and len(words) == 2 else None


def _held(smi: Ask, gpus: tuple[DetectedGpu, ...]) -> Iterator[HealthFinding]:
    """What others hold on the cards, with the processes that the driver names."""
    states = gpu_states(smi)
    text = smi("--query-compute-apps=gpu_uuid,pid,used_memory,process_name", "--format=csv,noheader,nounits") or ""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if len(row) == 4]
    for gpu in gpus:
        if gpu.index not in states:
            continue
        held = states[gpu.index].held_bytes
        who = [f"{row[1]} {Path(row[3]).name} {row[2]} MiB" for row in rows if row[0] == gpu.uuid]
        status: Status = "warn" if held > HELD_BYTES else "ok"
        words = f"others hold {gib(held)}" + (f" (pid {'; '.join(who[:4])})" if who else "")
        fix = "stop them, or leave this card out with CUDA_VISIBLE_DEVICES" if status == "warn" else ""
        yield HealthFinding(f"gpu {gpu.index}", status, words, fix, held)


def _compiling(tools: Toolchain) -> Iterator[HealthFinding]:
    """Compiler, nvcc and DeepSpeed's host optimizer."""
    if tools.compiler is None:
        yield HealthFinding("compiler", "warn", "none on the PATH", "apt install g++ (for ZeRO with offload)")
    else:
        fix = tools.hint() if tools.compiler_problem else ""
        words = tools.compiler + (f" cannot compile: {tools.compiler_problem}" if tools.compiler_problem else "")
        yield HealthFinding("compiler", "warn" if tools.compiler_problem else "ok", words, fix)
    needed = tools.needs_nvcc and bool(tools.torch_cuda)
    words = f"CUDA {tools.nvcc}" if tools.nvcc else "none"
    yield HealthFinding("nvcc", "ok", words + ("" if needed else "; nothing here needs it"), value=tools.nvcc or None)
    if version_of("deepspeed") is None:
        return
    problem = tools.problem()
    if tools.locks:
        lock = tools.locks[0]
        if is_live(lock):
            yield HealthFinding("cpu adam", "ok", f"is being compiled now, in {lock.parent}")
        else:
            words = f"{lock} is there and nobody compiles behind it: every later run would wait for it"
            yield HealthFinding("cpu adam", "warn", words, f"rm {lock}")
    elif CPU_ADAM in tools.built:
        yield HealthFinding("cpu adam", "ok", f"built, in {tools.folder}")
    elif problem is None:
        yield HealthFinding("cpu adam", "ok", "not built yet, can be: a minute or two at the first run with offload")
    else:
        yield HealthFinding("cpu adam", "warn", f"cannot be built: {problem}", tools.hint())


def _memlock(has_gpu: bool) -> HealthFinding:
    """Without a GPU nothing is page-locked."""
    try:
        import resource
    except ImportError:  # no such limit outside Unix
        return HealthFinding("memlock", "ok", "no such limit here")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return HealthFinding("memlock", "ok", "unlimited")
    tight = has_gpu and limit < MEMLOCK_BYTES
    fix = "ulimit -l unlimited (docker: --ulimit memlock=-1), or levers.pin_memory: false" if tight else ""
    return HealthFinding("memlock", "warn" if tight else "ok", f"{gib(limit)} may be page-locked", fix, limit)


def _shared_memory(root: Path) -> HealthFinding:
    place = root / "dev/shm"
    if not place.is_dir():
        return HealthFinding("/dev/shm", "warn", "is not there", "loader.workers: 0, or mount a tmpfs there")
    free = machine.disk_free_bytes(place) or 0
    small = free < SHM_BYTES
    fix = "docker: --shm-size=8g or --ipc=host; else loader.workers: 0" if small else ""
    return HealthFinding("/dev/shm", "warn" if small else "ok", f"{gib(free)} free", fix, free)


def _disks(place: Place) -> Iterator[HealthFinding]:
    """Room and the right to write where runs and caches go."""
    places = {"run folder": (place.runs, "run.folder"), "cache": (cache_folder(place.environment), "MEMFIT_CACHE")}
    for name, (folder, key) in places.items():
        free = machine.disk_free_bytes(folder) or 0
        above = folder.absolute()
        while not above.exists():
            above = above.parent
        # A cache that cannot be written costs time only.
        worst: Status = "fail" if name == "run folder" else "warn"
        if not os.access(above, os.W_OK):
            yield HealthFinding(name, worst, f"{above} cannot be written", f"set {key} to a place you own", free)
            continue
        status: Status = worst if free < DISK_FAIL else "warn" if free < DISK_WARN and name == "run folder" else "ok"
        fix = "" if status == "ok" else f"make room, or set {key} to another disk"
        yield HealthFinding(name, status, f"{gib(free)} free in {folder}", fix, free)


def _limits(root: Path) -> Iterator[HealthFinding]:
    """Host memory and CPUs as the container limits them."""
    limit = machine.host_memory_bytes(root)
    text = machine._read(root / "proc/meminfo")
    total, available = (_meminfo(text, name) for name in ("MemTotal", "MemAvailable"))
    if limit is None:
        yield HealthFinding("host memory", "ok", "the kernel does not say")
    else:
        inside = f" of the machine's {gib(total)}, by the container's limit" if total and limit < total else ""
        rest = f", {gib(available)} available" if available else ""
        small = limit < HOST_BYTES
        fix = "raise the container's limit; small models only until then" if small else ""
        yield HealthFinding("host memory", "warn" if small else "ok", f"{gib(limit)}{inside}{rest}", fix, limit)
    usable, there = machine.cpu_count(root), os.cpu_count() or 1
    words = f"{usable}" + (f" of {there}, by affinity or the container's limit" if usable < there else "")
    fix = "raise the container's CPU limit: pictures are decoded beside the training step" if usable < 2 else ""
    yield HealthFinding("cpus", "warn" if usable < 2 else "ok", words, fix, usable)


def _meminfo(text: str, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(piece) for piece in re.findall(r"\d+", version.partition("+")[0])[:3])
