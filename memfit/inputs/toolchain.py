"""What compiles DeepSpeed's operators on this machine, found without importing torch or DeepSpeed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Enough of a program to show that compiler, C++20, OpenMP and Python's headers are there. torch.utils.cpp_extension
# asks for -std=c++20, deepspeed.ops.op_builder.cpu.builder:CPUOpBuilder.cxx_args for -fopenmp.
PROBE = "#include <concepts>\n#include <omp.h>\n#include <Python.h>\nint main() { return 0; }\n"
PROBE_SECONDS = 20.0
NEW_SECONDS = 30.0  # of a lock: what goes before and after ninja
CPU_ADAM, SHARED_MEMORY = OPERATORS = "cpu_adam", "deepspeed_shm_comm"


@dataclass(frozen=True)
class Toolchain:
    """`compiler`: its path, None without one; `compiler_problem`: why it cannot compile what torch's extensions need.

    `nvcc`: the release of the CUDA compiler, "" without one. `torch_cuda`: the CUDA that torch was built with, None for
    a CPU build, "" without torch. `needs_nvcc`: the installed DeepSpeed wants CUDA's compiler for its host optimizer
    (before 0.19 it did). `folder`: where torch keeps what it compiles; `built`: operators that lie there, made for this
    environment. `locks`: left there by a build that is going on, or was killed.
    """

    compiler: str | None
    compiler_problem: str | None
    ninja: str | None
    nvcc: str
    torch_cuda: str | None
    needs_nvcc: bool
    folder: Path
    built: tuple[str, ...]
    locks: tuple[Path, ...] = ()

    def problem(self) -> str | None:
        """Why DeepSpeed's operators cannot be compiled here; None if they can."""
        if self.compiler is None:
            return "there is no C++ compiler (g++ or clang++) on the PATH"
        if self.compiler_problem:
            return f"{self.compiler} cannot compile: {self.compiler_problem}"
        if self.ninja is None:
            return "ninja is not installed"
        if self.needs_nvcc and self.torch_cuda:
            if not self.nvcc:
                return f"there is no nvcc of CUDA {self.torch_cuda}"
            if self.nvcc.partition(".")[0] != self.torch_cuda.partition(".")[0]:
                return f"nvcc is of CUDA {self.nvcc}, torch of CUDA {self.torch_cuda}"
        return None

    def hint(self) -> str:
        """The smallest change that mends `problem`."""
        if self.compiler is None or self.compiler_problem:
            return "install g++ 11 or newer and Python's headers (Debian: apt install g++ python3-dev)"
        if self.ninja is None:
            return "pip install ninja"
        major = (self.torch_cuda or "").partition(".")[0]
        return f"install CUDA {major}'s nvcc and set CUDA_HOME, or pip install 'deepspeed>=0.19.8', which needs none"


def find_toolchain(environment: Mapping[str, str] | None = None) -> Toolchain:
    """Looks for everything; under a second."""
    values = os.environ if environment is None else environment
    path = os.pathsep.join([str(Path(sys.executable).parent), values.get("PATH", "")])
    named = values.get("CXX", "")
    compiler = next(
        (found for name in (named, "c++", "g++", "clang++") if name and (found := _which(name, path))), None
    )
    folder, ninja = extension_folder(values), _which("ninja", path)
    return Toolchain(
        compiler=compiler,
        compiler_problem=_compile_problem(compiler) if compiler else None,
        ninja=ninja,
        nvcc=_nvcc_release(values, path),
        torch_cuda=torch_cuda(),
        needs_nvcc=_needs_nvcc(),
        folder=folder,
        built=tuple(name for name in OPERATORS if is_built(folder, name, ninja)),
        locks=tuple(lock for name in OPERATORS if (lock := lock_of(folder, name))),
    )


def extension_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Where torch keeps compiled extensions. Source: torch.utils.cpp_extension:_get_build_directory."""
    values = os.environ if environment is None else environment
    if values.get("TORCH_EXTENSIONS_DIR"):
        return Path(values["TORCH_EXTENSIONS_DIR"])
    cuda = torch_cuda()
    device = f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    cache = Path(values.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    return cache / f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}_{device}"


def is_built(folder: Path, name: str, ninja: str | None = None) -> bool:
    """Whether torch would load an operator from there as it is: compiled with this environment's headers, up to date.

    Without `ninja` its own bookkeeping is not asked; copied folders look complete then and are compiled again.
    """
    place = folder / name
    try:
        rules = (place / "build.ninja").read_text(encoding="utf-8")
    except OSError:
        return False
    if not (place / f"{name}.so").is_file() or sys.prefix not in rules or lock_of(folder, name):
        return False
    if ninja is None:
        return True
    try:
        done = subprocess.run(
            [ninja, "-n", "-C", str(place)], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "no work to do" in done.stdout


def lock_of(folder: Path, name: str) -> Path | None:
    """The lock that a build holds, or left behind when it was killed: who comes later then waits for it for ever.

    Source: torch.utils.file_baton:FileBaton.wait, torch.utils.cpp_extension:_jit_compile.
    """
    lock = folder / name / "lock"
    return lock if lock.exists() else None


def is_live(lock: Path, processes: Path = Path("/proc")) -> bool:
    """Whether somebody is compiling behind a lock: a process works in its folder (ninja does), or it is quite new.

    The lock itself names nobody. Processes of other users, and of other machines that share the folder, are not seen.
    """
    try:
        if time.time() - lock.stat().st_mtime < NEW_SECONDS:
            return True
        folder = lock.parent.resolve()
    except OSError:  # gone meanwhile
        return False
    for process in processes.glob("[0-9]*"):
        try:
            if (process / "cwd").resolve(strict=True) == folder:
                return True
        except OSError:  # ended, or another user's
            continue
    return False


def torch_cuda() -> str | None:
    """The CUDA version in torch/version.py, None for a build without, "" without torch. torch is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda(?::[^=]*)?\s*=\s*'([0-9.]+)'", text, re.MULTILINE)
    return found[1] if found else None


def version_of(package: str) -> str | None:
    """The installed version of a package, None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _needs_nvcc() -> bool:
    """Whether DeepSpeed's CPU Adam is built by a CUDA builder: it has one outside op_builder/cpu then."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "ops" / "op_builder" / "cpu_adam.py").is_file()


def _which(name: str, path: str) -> str | None:
    return shutil.which(name, path=path)


def _compile_problem(compiler: str) -> str | None:
    headers = sysconfig.get_paths().get("include", "")
    words = [compiler, "-std=c++20", "-fopenmp", "-fsyntax-only", f"-I{headers}", "-x", "c++", "-"]
    try:
        done = subprocess.run(words, input=PROBE, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    errors = [line.strip() for line in done.stderr.splitlines() if "error" in line]
    return (errors or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]


def _nvcc_release(environment: Mapping[str, str], path: str) -> str:
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    place = Path(home) / "bin" / "nvcc" if home else None
    nvcc = str(place) if place is not None and place.is_file() else _which("nvcc", path)
    if nvcc is None:
        usual = Path("/usr/local/cuda/bin/nvcc")  # torch.utils.cpp_extension:_find_cuda_home looks there last
        nvcc = str(usual) if usual.is_file() else None
    if nvcc is None:
        return ""
    try:
        done = subprocess.run([nvcc, "-V"], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"release ([0-9]+\.[0-9]+)", done.stdout)
    return found[1] if found else ""
