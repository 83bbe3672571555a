"""Hardware: how many of which GPU, on how many machines, with how much host memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuRow:
    """One kind of GPU.

    `capacity_bytes` is the total that `torch.cuda.mem_get_info` reports, which is below the nominal size.
    `source` says where it is from; `verified` is "measured", "cited" or "nominal" (0.965 of nominal, unverified).
    """

    name: str
    chip: str
    nominal_gib: int
    capacity_bytes: int
    compute_capability: str
    has_bf16: bool
    verified: str
    source: str


@dataclass(frozen=True)
class Hardware:
    """What a run may use. `gpu` is None for CPU ranks (`2xcpu`)."""

    gpu: GpuRow | None
    gpus_per_node: int
    nodes: int = 1
    host_memory_bytes: int | None = None
    nvme_bytes: int | None = None
    detected: bool = False

    @property
    def ranks(self) -> int:
        """Worker processes: one a GPU, or one a CPU rank."""
        return self.gpus_per_node * self.nodes

    @property
    def text(self) -> str:
        """The spelling that `--gpus` takes: 2xRTX3090, 2x8xA100-40G, 2xcpu."""
        kind = self.gpu.name if self.gpu else "cpu"
        node = f"{self.gpus_per_node}x{kind}"
        return node if self.nodes == 1 else f"{self.nodes}x{node}"
