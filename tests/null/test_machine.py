"""What a machine has, read from a pretended driver and pretended control groups."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from memfit.errors import UserError
from memfit.inputs import cache, machine
from memfit.inputs.machine import DetectedGpu, TorchFacts, gpu_row, torch_gpu_problem
from memfit.specs.profile import ParameterRow, Profile
from memfit.units import GIB, MIB

HEADER = """\
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 550.163.01             Driver Version: 550.163.01     CUDA Version: 12.4     |
+-----------------------------------------------------------------------------------------+
"""
TWO_3090 = """\
0, NVIDIA GeForce RTX 3090, 24576, 550.163.01, GPU-aaa, 8.6
1, NVIDIA GeForce RTX 3090, 24576, 550.163.01, GPU-bbb, 8.6
"""


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def pretend_driver(folder: Path, monkeypatch: pytest.MonkeyPatch, rows: str, *, old: bool = False, rc: int = 0) -> None:
    """An nvidia-smi on PATH that answers the query and prints the header; an old one does not know compute_cap."""
    folder.mkdir(exist_ok=True)
    (folder / "rows").write_text(rows)
    (folder / "header").write_text(HEADER)
    refuse = '*compute_cap*) echo "Field compute_cap is not a valid field to query."; exit 2;;' if old else ""
    script = folder / "nvidia-smi"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in\n{refuse}\n'
        f'--query-gpu*) while read -r line; do echo "$line"; done < "{folder}/rows";;\n'
        f'*) while read -r line; do echo "$line"; done < "{folder}/header";;\nesac\nexit {rc}\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))


def test_two_3090(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_driver(tmp_path / "bin", monkeypatch, TWO_3090)
    gpus = machine.detected_gpus()
    assert [(gpu.index, gpu.driver, gpu.cuda_version, gpu.compute_capability) for gpu in gpus] == [
        (0, "550.163.01", "12.4", "8.6"),
        (1, "550.163.01", "12.4", "8.6"),
    ]
    hardware = machine.detect()
    assert (hardware.text, hardware.detected) == ("2xRTX3090", True)
    assert hardware.gpu is not None
    assert hardware.gpu.verified == "cited"


@pytest.mark.parametrize(
    ("visible", "indices"),
    [("1", [1]), ("GPU-bbb", [1]), ("1,0", [1, 0]), ("", []), ("-1", []), ("0,7,1", [0])],
)
def test_cuda_visible_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, indices: list[int]
) -> None:
    pretend_driver(tmp_path / "bin", monkeypatch, TWO_3090)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in machine.detected_gpus()] == indices
    assert machine.detect().ranks == max(1, len(indices))


def test_an_old_driver_without_compute_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_driver(tmp_path / "bin", monkeypatch, "0, Tesla T4, 15360, 470.82.01, GPU-a\n", old=True)
    (gpu,) = machine.detected_gpus()
    assert gpu.compute_capability == ""
    assert gpu_row(gpu).name == "T4"


@pytest.mark.parametrize("rows", ["", "No devices were found\n", "0, NVIDIA GB10, [N/A], 580.1, GPU-a, 12.1\n"])
def test_no_usable_answer_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str) -> None:
    pretend_driver(tmp_path / "bin", monkeypatch, rows)
    assert machine.detected_gpus() == ()


def test_no_driver_or_a_failing_one_is_one_cpu_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_driver(tmp_path / "bin", monkeypatch, TWO_3090, rc=9)
    assert machine.detected_gpus() == ()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    hardware = machine.detect()
    assert (hardware.gpu, hardware.text) == (None, "1xcpu")


def test_a_hanging_driver_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "nvidia-smi"
    script.write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(machine, "SMI_SECONDS", 0.05)
    assert machine.detected_gpus() == ()


def test_gpus_of_several_kinds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_driver(tmp_path / "bin", monkeypatch, TWO_3090 + "2, NVIDIA GeForce GT 710, 2048, 470.1, GPU-c, 3.5\n")
    with pytest.raises(UserError, match="GPUs of several kinds") as error:
        machine.detect()
    assert "CUDA_VISIBLE_DEVICES=0" in error.value.hint


@pytest.mark.parametrize(
    ("name", "mib", "row"),
    [
        ("NVIDIA GeForce RTX 3090", 24576, "RTX3090"),
        ("NVIDIA GeForce RTX 4090", 24564, "RTX4090"),
        ("NVIDIA GeForce RTX 4080", 16376, "RTX4080"),
        ("NVIDIA A10", 23028, "A10"),
        ("Tesla T4", 15360, "T4"),
        ("Tesla V100-SXM2-32GB", 32768, "V100-32G"),
        ("NVIDIA L40S", 46068, "L40S"),
        ("NVIDIA A100-SXM4-40GB", 40960, "A100-40G"),
        ("NVIDIA A100-PCIE-40GB", 40960, "A100-40G"),
        ("NVIDIA A100-SXM4-80GB", 81920, "A100-80G"),
        ("NVIDIA A100 80GB PCIe", 81920, "A100-80G"),
        ("NVIDIA H100 80GB HBM3", 81559, "H100-80G"),
        ("NVIDIA H100 PCIe", 81559, "H100-PCIe"),
        ("NVIDIA H100 NVL", 95830, "H100-94G"),
        ("NVIDIA GH200 480GB", 97871, "H100-96G"),
        ("NVIDIA H200", 143771, "H200"),
        ("NVIDIA B200", 183359, "B200"),
        ("NVIDIA GeForce RTX 2080 Ti", 11264, "RTX2080Ti"),
        ("NVIDIA GeForce RTX 3060", 12288, "RTX3060-12G"),
        ("NVIDIA GeForce RTX 3080", 10240, "RTX3080"),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "RTX4060Ti-16G"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16376, "RTX4070TiS"),
        ("NVIDIA GeForce RTX 5080", 16303, "RTX5080"),
        ("NVIDIA TITAN RTX", 24576, "TitanRTX"),
        ("NVIDIA A10G", 23028, "A10G"),
        ("NVIDIA A40", 46068, "A40"),
        ("NVIDIA RTX A6000", 49140, "A6000"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "RTX6000Ada"),
        ("NVIDIA L4", 23034, "L4"),
        ("NVIDIA L40", 46068, "L40"),
        ("Tesla V100-SXM2-16GB", 16384, "V100-16G"),
        ("Tesla P100-PCIE-16GB", 16384, "P100"),
        ("Tesla P40", 24576, "P40"),
    ],
)
def test_driver_names_find_their_rows(name: str, mib: int, row: str) -> None:
    found = gpu_row(DetectedGpu(0, name, mib * MIB, "550.1", "8.0", "12.4"))
    assert (found.name, found.verified in {"cited", "nominal"}) == (row, True)
    assert found.capacity_bytes < mib * MIB


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4080 SUPER", "NVIDIA GeForce RTX 3080"]
)
def test_a_gpu_without_a_row_is_what_the_driver_says(name: str) -> None:
    found = gpu_row(DetectedGpu(0, name, 16 * GIB, "550.1", "7.5", "12.4"))
    assert (found.verified, found.has_bf16) == ("detected", False)
    assert found.capacity_bytes == int(0.965 * 16 * GIB)
    assert " " not in found.name
    assert "550.1" in found.source


def facts(
    version: str, cuda: str | None, *, archs: str = "", available: bool = False, error: str | None = None
) -> TorchFacts:
    return TorchFacts(version, cuda, tuple(archs.split()), available, error)


CU126 = "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90"
CU130 = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"
INDEX = "--index-url https://download.pytorch.org/whl"


@pytest.mark.parametrize(
    ("torch", "gpu", "problem", "hint"),
    [
        # A CPU build: the newest index that the driver runs.
        (
            facts("2.13.0+cpu", None),
            ("RTX 3090", "550.163.01", "8.6", "12.4"),
            "is a CPU build, but there is a RTX 3090, driver 550.163.01 (CUDA 12.4)",
            f"pip install torch==2.13.0 {INDEX}/cu126",
        ),
        (facts("2.13.0+cpu", None), ("RTX 3090", "580.95.05", "8.6", "13.0"), "is a CPU build", f"{INDEX}/cu130"),
        (facts("2.11.0+cpu", None), ("RTX 3090", "550.163.01", "8.6", "12.4"), "is a CPU build", f"{INDEX}/cu128"),
        # Volta has kernels in cu126 only, Blackwell none there.
        (facts("2.13.0+cpu", None), ("V100", "580.95.05", "7.0", "13.0"), "is a CPU build", f"{INDEX}/cu126"),
        (
            facts("2.13.0+cpu", None),
            ("RTX 5090", "570.1", "12.0", "12.8"),
            "is a CPU build",
            "update the driver to 580.65.06 or newer, then pip install torch==2.13.0",
        ),
        # A build for a CUDA that the driver is too old for.
        (
            facts("2.13.0+cu130", "13.0", error="The NVIDIA driver on your system is too old"),
            ("A10", "535.183.01", "8.6", "12.2"),
            "torch 2.13.0+cu130 (CUDA 13.0) needs a newer driver than that of the A10, driver 535.183.01 (CUDA 12.2)",
            f"{INDEX}/cu126",
        ),
        (
            facts("2.13.0+cu126", "12.6"),
            ("T4", "470.82.01", "7.5", "11.4"),
            "needs a newer driver",
            "driver to 525.60.13",
        ),
        # A build that sees the GPU but has no kernels for it.
        (
            facts("2.13.0+cu130", "13.0", archs=CU130, available=True),
            ("V100", "580.95.05", "7.0", "13.0"),
            "has no kernels for compute capability 7.0",
            f"{INDEX}/cu126",
        ),
        (
            facts("2.13.0+cu126", "12.6", archs=CU126, available=True),
            ("RTX 5090", "590.1", "12.0", "13.1"),
            "has no kernels for compute capability 12.0",
            f"{INDEX}/cu130",
        ),
        # Everything fits, and yet torch cannot.
        (
            facts("2.13.0+cu126", "12.6", error="CUDA unknown error"),
            ("A10", "550.163.01", "8.6", "12.4"),
            "cannot use the A10, driver 550.163.01 (CUDA 12.4): CUDA unknown error",
            "run nvidia-smi",
        ),
        (facts("2.13.0+cpu", None), ("K80", "470.1", "3.7", "11.4"), "is a CPU build", "run with --gpus 1xcpu"),
    ],
)
def test_a_gpu_that_torch_cannot_use(
    torch: TorchFacts, gpu: tuple[str, str, str, str], problem: str, hint: str
) -> None:
    name, driver, capability, cuda = gpu
    found = torch_gpu_problem(torch, [DetectedGpu(0, name, 24 * GIB, driver, capability, cuda)])
    assert found is not None
    assert problem in found.problem
    assert hint in found.hint
    assert found.exit_code == 1


@pytest.mark.parametrize(
    ("archs", "capability"),
    [(CU126, "8.6"), (CU126, "8.9"), ("sm_80", "8.6"), (CU130, "12.1"), ("sm_90 compute_90", "12.0"), (CU126, "")],
)
def test_a_gpu_that_torch_can_use(archs: str, capability: str) -> None:
    gpu = DetectedGpu(0, "GPU", 24 * GIB, "580.95.05", capability, "13.0")
    assert torch_gpu_problem(facts("2.13.0", "12.6", archs=archs, available=True), [gpu]) is None


def test_without_a_gpu_any_torch_will_do() -> None:
    assert torch_gpu_problem(facts("2.13.0+cpu", None), []) is None


def test_the_gpu_without_kernels_is_named_among_several() -> None:
    gpus = [
        DetectedGpu(0, "RTX 3090", 24 * GIB, "580.95.05", "8.6", "13.0"),
        DetectedGpu(1, "V100", 32 * GIB, "580.95.05", "7.0", "13.0"),
    ]
    found = torch_gpu_problem(facts("2.13.0", "13.0", archs=CU130, available=True), gpus)
    assert found is not None
    assert "V100" in found.problem


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = f"MemTotal:       {64 * 1024 * 1024} kB\nMemFree: 1 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64 * GIB),
        ({"sys/fs/cgroup/memory.max": "max\n"}, 64 * GIB),
        ({"sys/fs/cgroup/memory.max": f"{8 * GIB}\n"}, 8 * GIB),
        # version 2, a limit on a parent group only
        (
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/box/memory.max": "max\n",
                "sys/fs/cgroup/pod/memory.max": f"{12 * GIB}\n",
            },
            12 * GIB,
        ),
        # version 1, where no limit is a number near 2^63
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 64 * GIB),
        (
            {
                "proc/self/cgroup": "5:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n",
                "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": f"{4 * GIB}\n",
            },
            4 * GIB,
        ),
    ],
)
def test_host_memory_is_what_the_container_allows(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert machine.host_memory_bytes(write(tmp_path, {"proc/meminfo": MEMINFO, **files})) == expected


def test_unknown_host_memory_is_none(tmp_path: Path) -> None:
    assert machine.host_memory_bytes(tmp_path) is None


def test_cpu_quota(tmp_path: Path) -> None:
    free = machine.cpu_count(tmp_path)
    assert free >= 1
    assert machine.cpu_count(write(tmp_path / "2", {"sys/fs/cgroup/cpu.max": "100000 100000"})) == 1
    assert machine.cpu_count(write(tmp_path / "u", {"sys/fs/cgroup/cpu.max": "max 100000"})) == free
    version_1 = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}
    assert machine.cpu_count(write(tmp_path / "1", version_1)) == 1


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    free = machine.disk_free_bytes(tmp_path / "a" / "b")
    assert free is not None
    assert free > 0


PROFILE = Profile("hand", "abc", (ParameterRow("w", (2, 3), "float32", "language", "", "other"),), 8, (("torch", "2"),))


def test_cache_round_trip(tmp_path: Path) -> None:
    assert cache.load_profile("abc", tmp_path) is None
    path = cache.store_profile(PROFILE, tmp_path)
    assert path is not None
    assert cache.load_profile("abc", tmp_path) == PROFILE
    assert [entry.name for entry in path.parent.iterdir()] == ["abc.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"key": "abc"}', '{"parameters": 3}', "\x00\xff"])
def test_a_broken_cache_file_is_ignored(tmp_path: Path, text: str) -> None:
    path = cache.store_profile(PROFILE, tmp_path)
    assert path is not None
    path.write_text(text, encoding="latin-1")
    assert cache.load_profile("abc", tmp_path) is None
    assert cache.store_profile(PROFILE, tmp_path) == path
    assert cache.load_profile("abc", tmp_path) == PROFILE


def test_a_file_under_another_key_is_not_taken(tmp_path: Path) -> None:
    path = cache.store_profile(PROFILE, tmp_path)
    assert path is not None
    path.rename(path.with_name("xyz.json"))
    assert cache.load_profile("xyz", tmp_path) is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "profiles").write_text("in the way")
    assert cache.store_profile(PROFILE, tmp_path) is None


def test_cache_key_and_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    key = cache.profile_key({"hidden_size": 8, "transformers_version": "5.1"}, "text")
    assert key == cache.profile_key({"transformers_version": "5.2", "hidden_size": 8}, "text")
    assert key != cache.profile_key({"hidden_size": 9}, "text")
    assert key != cache.profile_key({"hidden_size": 8}, "llava")
    monkeypatch.setattr(cache, "installed_versions", lambda: (("torch", "9"),))
    assert key != cache.profile_key({"hidden_size": 8}, "text")
    assert cache.cache_folder({"MEMFIT_CACHE": "/x"}) == Path("/x")
    assert cache.cache_folder({"XDG_CACHE_HOME": "/y"}) == Path("/y/memfit")
    assert cache.cache_folder({}) == Path.home() / ".cache" / "memfit"
