"""What the wires between GPUs, and between a GPU and host memory, carry in practice.

Rates are in bytes a second and one direction. The shares of a data sheet's figure that arrive are NCCL's own: its
topology model chooses algorithms by them, and its tests reach them.
"""

from __future__ import annotations

from dataclasses import dataclass

from memfit.specs.hardware import GpuLink, Hardware

_NCCL = "NVIDIA/nccl:src/graph/topo.h"

# 8, 16 and 32 GT/s a lane, 128 of 130 bits are payload. Source: PCI Express base specifications 3 to 5.
PCIE_LANE_RATE = {3: 8e9 * 128 / 130 / 8, 4: 16e9 * 128 / 130 / 8, 5: 32e9 * 128 / 130 / 8}

# PCI_BW: 12 GB/s over PCIe 3 x16, of the 15.75 that its lanes carry.
PCIE_SHARE = 12e9 / (16 * PCIE_LANE_RATE[3])

# One NVLink, by compute capability from which it holds. Source: ncclTopoNVLinkBw. 8.6 (bridges of GA102) is a case of
# its own there.
NVLINK_RATE = ((10.0, 40.1e9), (9.0, 20.6e9), (8.0, 20e9), (7.0, 20e9), (6.0, 18e9))
NVLINK_RATE_GA102 = (8.6, 12e9)

# Without peer copies everything goes through host memory, where all GPUs meet: bus bandwidth of all-reduce on 5090s,
# PCIe 5 x16, 35 GB/s with 4 and 28 GB/s with 8 of them. Source: NVIDIA/nccl#1639.
THROUGH_HOST_SHARE = ((4, 35e9 / (16 * PCIE_LANE_RATE[5])), (None, 28e9 / (16 * PCIE_LANE_RATE[5])))

# NET_BW: what NCCL takes for a network card that does not say its speed (100 Gbit/s). Nobody says a node's.
NETWORK_RATE = 12e9


@dataclass(frozen=True)
class LinkRate:
    """What a collective's ring carries a GPU, in bytes/s: `kind` is nvlink, pcie, host, network or none."""

    kind: str
    rate: float
    source: str


def pcie_rate(link: GpuLink) -> float:
    """Bytes/s that arrive between one GPU and host memory that is page-locked, in one direction."""
    return PCIE_LANE_RATE[link.pcie_generation] * link.pcie_lanes * PCIE_SHARE


def nvlink_rate(link: GpuLink, compute_capability: str) -> float:
    """Bytes/s that arrive over all NVLinks of one GPU, in one direction."""
    capability = float(compute_capability or 0)
    if capability == NVLINK_RATE_GA102[0]:
        return link.nvlinks * NVLINK_RATE_GA102[1]
    per_link = next((rate for least, rate in NVLINK_RATE if capability >= least), 0.0)
    return min(link.nvlinks * per_link, link.nvlink)


def ring_rate(hardware: Hardware) -> LinkRate | None:
    """What all-gather, reduce-scatter and all-reduce run at on this hardware; None where the GPU's links are unknown.

    A bridge that joins a pair is an extra part: it counts where it was detected (`hardware.links`), not otherwise.
    CPU ranks and a single GPU have no link: kind "none", rate infinite.
    """
    if hardware.ranks == 1 or hardware.gpu is None:
        return LinkRate("none", float("inf"), "one rank, or CPU ranks in shared memory")
    link = hardware.gpu.link
    if link is None:
        return None
    inside = _inside(hardware, link)
    if hardware.nodes > 1 and inside.rate > NETWORK_RATE:
        return LinkRate("network", NETWORK_RATE, f"{_NCCL}: NET_BW, 100 Gbit/s a node, assumed")
    return inside


def _inside(hardware: Hardware, link: GpuLink) -> LinkRate:
    """The rate within one node."""
    assert hardware.gpu is not None
    wanted = hardware.links or ("nvlink" if link.nvlink_reach == "all" else "pcie")
    if hardware.gpus_per_node == 1:
        return LinkRate("none", float("inf"), "one GPU a node")
    if wanted == "nvlink" and link.nvlink:
        rate = nvlink_rate(link, hardware.gpu.compute_capability)
        return LinkRate("nvlink", rate, f"{_NCCL}: ncclTopoNVLinkBw, {link.nvlinks} links")
    if wanted == "pcie" and link.peer:
        return LinkRate("pcie", pcie_rate(link), f"{_NCCL}: PCI_BW, scaled from PCIe 3 x16")
    share = next(part for most, part in THROUGH_HOST_SHARE if most is None or hardware.gpus_per_node <= most)
    raw = PCIE_LANE_RATE[link.pcie_generation] * link.pcie_lanes
    return LinkRate(
        "host", raw * share, "NVIDIA/nccl#1639: all-reduce of 5090s without peer copies, as a share of PCIe"
    )
