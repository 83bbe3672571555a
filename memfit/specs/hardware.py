"""Hardware: how many of which GPU, on how many machines, with how much host memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuSpeed:
    """How fast one kind of GPU is by its data sheet: dense products, never the figure with sparsity.

    `fp32`, `tf32`, `fp16`, `bf16`: FLOP/s of matrix products, the 16-bit ones summed in fp32 (GeForce cards before
    Blackwell's data-centre parts do that at half the printed rate); None where the chip has no such unit. `bandwidth`:
    bytes/s of the card's memory. `sms`, `boost_hz`: multiprocessors, and the clock that the products' figures are for.
    `verified` is "cited" or "memory", `source` says where it is from.
    """

    fp32: float
    tf32: float | None
    fp16: float
    bf16: float | None
    bandwidth: float
    sms: int
    boost_hz: float
    verified: str
    source: str

    def flops(self, precision: str) -> float | None:
        """FLOP/s of products in "fp32", "tf32", "fp16" or "bf16"; None where the chip has no such unit."""
        return {"fp32": self.fp32, "tf32": self.tf32, "fp16": self.fp16, "bf16": self.bf16}[precision]


@dataclass(frozen=True)
class GpuLink:
    """What one GPU is wired to. Bytes/s in one direction, as the data sheet prints them.

    `nvlink` is the sum over all of a card's NVLinks, 0 without; `nvlinks` their number, `nvlink_reach` "all" GPUs of a
    node, a "pair" that a bridge joins (an extra part), or "". `peer`: GPUs of this kind copy to each other over PCIe
    without a stop in host memory, as the stock driver has it.
    """

    pcie_generation: int
    pcie_lanes: int = 16
    nvlink: float = 0.0
    nvlinks: int = 0
    nvlink_reach: str = ""
    peer: bool = True
    verified: str = "memory"
    source: str = ""


@dataclass(frozen=True)
class GpuRow:
    """One kind of GPU.

    `capacity_bytes` is the total that `torch.cuda.mem_get_info` reports, which is below the nominal size.
    `source` says where it is from; `verified` is "measured", "cited" or "nominal" (0.965 of nominal, unverified).
    `chip` is what the driver calls it, without maker, board and size. `speed`, `link`: None for a GPU that has no row.
    """

    name: str
    chip: str
    nominal_gib: int
    capacity_bytes: int
    compute_capability: str
    has_bf16: bool
    verified: str
    source: str
    speed: GpuSpeed | None = None
    link: GpuLink | None = None


@dataclass(frozen=True)
class Hardware:
    """What a run may use. `gpu` is None for CPU ranks (`2xcpu`).

    `held_bytes`: what other processes and the desktop hold on the fullest of the GPUs now; the row's capacity is
    without it already. `links` says, where it was detected, how the GPUs of a node are joined: "nvlink", "pcie" or
    "host" (no direct way); "" means as the row says.
    """

    gpu: GpuRow | None
    gpus_per_node: int
    nodes: int = 1
    host_memory_bytes: int | None = None
    nvme_bytes: int | None = None
    detected: bool = False
    held_bytes: int = 0
    links: str = ""

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
