"""The CUDA builds of torch that its index offers: which driver and which GPUs each one runs on."""

from __future__ import annotations

from dataclasses import dataclass

MATRIX = "PyTorch CUDA support matrix in pytorch/pytorch RELEASE.md: pull requests #175253 (2.11), #182849 and #197555"
# Every 12.x runs on the drivers of 12.0, every 13.x on those of 13.0.
# Source: docs.nvidia.com/deploy/cuda-compatibility, "Minor Version Compatibility".
DRIVER_CUDA_12 = "525.60.13"
DRIVER_CUDA_13 = "580.65.06"


@dataclass(frozen=True)
class TorchBuild:
    """One index of https://download.pytorch.org/whl. Capabilities are inclusive; versions are torch's minor ones."""

    tag: str
    cuda: str
    min_driver: str
    min_capability: float
    max_capability: float
    first_minor: int
    last_minor: int | None
    source: str

    def is_for(self, torch_version: str) -> bool:
        """Whether this index has that version of torch (2.x)."""
        pieces = torch_version.split(".")
        if len(pieces) < 2 or pieces[0] != "2" or not pieces[1].isdigit():
            return False
        minor = int(pieces[1])
        return self.first_minor <= minor and (self.last_minor is None or minor <= self.last_minor)

    def has_kernels(self, capability: float) -> bool:
        """Whether the build runs on a GPU of this compute capability; 0 stands for unknown."""
        return capability == 0 or self.min_capability <= capability <= self.max_capability


# Newest last: of those that fit, the last is recommended. cu132 was experimental in 2.12 and 2.13, so it is no row.
TORCH_BUILDS: tuple[TorchBuild, ...] = (
    TorchBuild("cu126", "12.6", DRIVER_CUDA_12, 5.0, 9.0, 6, 14, MATRIX),
    TorchBuild("cu128", "12.8", DRIVER_CUDA_12, 7.5, 12.0, 7, 11, MATRIX),
    TorchBuild("cu130", "13.0", DRIVER_CUDA_13, 7.5, 12.1, 9, None, MATRIX),
)
