"""What a catalogue row does in a second, and what a traced step asks for: the two sides of `memfit.physics.speed`."""

from __future__ import annotations

from memfit.catalog.links import pcie_rate, ring_rate
from memfit.catalog.matmul import achieved_flops
from memfit.physics.speed import HOST_STEP_RATE, Rates, StepWork
from memfit.specs.hardware import Hardware
from memfit.specs.trace import StepTrace

# Bytes that operators other than products read and write, for each byte that any operator puts into a new tensor.
# Counted on transformers' Llama, 1.88 to 1.92 a layer; tests/unit/test_decoder_work.py counts again.
TRAFFIC_PER_WRITTEN = 1.9


def rates_of(hardware: Hardware, precision: str) -> Rates | None:
    """Rates for products in "fp32", "tf32", "fp16" or "bf16"; None where the catalogue does not know the GPU's speed.

    A node of GeForce cards is taken for a desktop, any other for a server: nobody states the host's memory.
    """
    row = hardware.gpu
    if row is None or row.speed is None or row.link is None:
        return None
    products, ring = achieved_flops(row, precision), ring_rate(hardware)
    if products is None or ring is None:
        return None
    host = "desktop" if row.name.startswith("RTX") and not row.name.startswith("RTX6000") else "server"
    return Rates(products.flops, row.speed.bandwidth, ring.rate, pcie_rate(row.link), HOST_STEP_RATE[host])


def traced_work(trace: StepTrace) -> StepWork | None:
    """The work of one traced micro-batch: products with what is computed again, elementwise bytes, kernels.

    None for a trace from before `written` was counted. What engines and optimizers add is for the caller to add.
    """
    if trace.written is None or trace.kernels is None:
        return None
    return StepWork(
        flops=float(sum(row.flops for row in trace.flops)),
        elementwise_bytes=float(TRAFFIC_PER_WRITTEN * trace.written),
        kernels=float(trace.kernels),
    )
