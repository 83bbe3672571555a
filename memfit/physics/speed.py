"""Seconds of one optimizer step on one rank, as a pure function of numbers or of arrays of candidates.

A step is a sum of parts, each bound by one thing: products by the GPU's arithmetic, elementwise work and the optimizer
by its memory, collectives by the links, offload by PCIe and the host's memory, loading by the workers. What runs at the
same time is counted once, to the degree that the engine states (`hidden`); how much that is in truth is not known, so
that every figure comes with the two ends: nothing overlaps, everything that may does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Number = float | NDArray[Any]

# Fit together over the rows of docs/measured/speed.md, where the errors stand. A test fits again.
# Share of the rate of large products (`memfit.catalog.matmul`) that the products of a training step reach: smaller
# matrices, uneven sizes, waits between kernels.
PRODUCT_SHARE = 0.87
# Host seconds to launch one kernel from eager Python, modules and autograd included; a faster GPU waits.
LAUNCH_SECONDS = 32e-6
# Host seconds of one call of an engine that fetches parameters module by module.
CALL_SECONDS = 0.55e-3
# Half of the published runs are off by no more than this when their source is left out of the fit, one by 72%.
TYPICAL_ERROR = 0.22
# Share of a data sheet's memory bandwidth that streaming kernels reach. BabelStream on A100 and H100; verified: memory.
MEMORY_SHARE = 0.85
# Bytes/s that an optimizer step on the host moves, all ranks of a node together. A server: 10e9 parameters of 30 bytes
# in 2.57 s on two Xeon 8168 (arXiv:2101.06840, table of CPU-Adam latencies; verified: memory). A desktop's two memory
# channels carry about a third of that.
HOST_STEP_RATE = {"server": 30 * 10e9 / 2.57, "desktop": 40e9}
# Pixels a second that one worker decodes, and resizes: Pillow on one core, on noisy pictures of 0.1 to 2.5 megapixels
# (JPEG 33, PNG and WebP 23 million; 50 million resized). Measured on a busy server, so that it is a low figure.
DECODED_PIXELS, RESIZED_PIXELS = 25e6, 50e6
# Elements of Adam on the host: fp32 weight, gradient and two moments are read, weight and moments written, and a 16-bit
# copy of the weight. Source: deepspeed.ops.adam.cpu_adam:DeepSpeedCPUAdam.
HOST_ADAM_BYTES = 4 * 4 + 3 * 4 + 2

PARTS = ("products", "recompute", "elementwise", "launch", "optimizer", "links", "offload", "host optimizer", "loading")


@dataclass(frozen=True)
class Rates:
    """What one rank's hardware does in a second.

    `products`: FLOP/s of large products in the precision of computation. `memory`: bytes/s of the GPU's memory by its
    data sheet. `ring`: bytes/s that a collective's ring carries (infinite for one rank). `host_link`: bytes/s between
    GPU and host memory, one direction. `host_step`: bytes/s of the optimizer on the host, the node's ranks together.
    """

    products: Number
    memory: Number
    ring: Number = float("inf")
    host_link: Number = float("inf")
    host_step: Number = HOST_STEP_RATE["server"]
    product_share: float = PRODUCT_SHARE
    memory_share: float = MEMORY_SHARE
    launch_seconds: float = LAUNCH_SECONDS
    call_seconds: float = CALL_SECONDS


@dataclass(frozen=True)
class StepWork:
    """What one rank has to do in one optimizer step of `micro_batches`; per micro-batch unless it says "a step".

    `flops`: products of forward and backward, without what is computed twice; `recompute_flops`: what checkpointing
    computes again. `elementwise_bytes`: read and written by everything that is no product. `kernels`: launched;
    `engine_calls`: modules whose parameters an engine fetches or lets go. `optimizer_bytes`: read and written on the
    GPU, a step.

    Collectives, in bytes of the whole (unsplit) tensors: `gathered_bytes` and `scattered_bytes` (reduced and split)
    each micro-batch, `step_gathered_bytes`, `step_scattered_bytes` and `step_reduced_bytes` (all-reduce) a step.

    Offload: `down_bytes` (GPU to host) and `up_bytes` each micro-batch, `step_down_bytes` and `step_up_bytes` a step;
    `host_optimizer_bytes` a step, of all ranks of the node together. `load_seconds`: what one worker needs for the
    samples, `workers` at a time.

    `hidden_links`, `hidden_offload`: the share of that traffic which the engine starts beside computation;
    `link_window`: the share of computation that links may run beside.
    """

    flops: Number
    micro_batches: Number = 1
    recompute_flops: Number = 0.0
    elementwise_bytes: Number = 0.0
    kernels: Number = 0.0
    engine_calls: Number = 0.0
    optimizer_bytes: Number = 0.0
    ranks: Number = 1
    gathered_bytes: Number = 0.0
    scattered_bytes: Number = 0.0
    step_gathered_bytes: Number = 0.0
    step_scattered_bytes: Number = 0.0
    step_reduced_bytes: Number = 0.0
    down_bytes: Number = 0.0
    up_bytes: Number = 0.0
    step_down_bytes: Number = 0.0
    step_up_bytes: Number = 0.0
    host_optimizer_bytes: Number = 0.0
    load_seconds: Number = 0.0
    workers: Number = 1
    hidden_links: Number = 0.0
    hidden_offload: Number = 0.0
    link_window: Number = 1.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: `seconds` at the stated overlap, between `low` (all that may is hidden) and `high` (nothing).

    `parts` are what the step waits for, by PARTS, and sum to `seconds`.
    """

    seconds: Number
    low: Number
    high: Number
    parts: dict[str, Number]

    @property
    def bound(self) -> Any:
        """The part that takes the most: its name, or an array of names."""
        stacked = np.stack([np.broadcast_to(np.asarray(self.parts[name]), self._shape()) for name in PARTS])
        names = np.asarray(PARTS)[stacked.argmax(axis=0)]
        return str(names) if names.ndim == 0 else names

    def _shape(self) -> tuple[int, ...]:
        return np.broadcast_shapes(*(np.shape(part) for part in self.parts.values()))


def gather_seconds(bytes_whole: Number, ranks: Number, rate: Number) -> Number:
    """All-gather, or reduce-scatter, of a tensor of `bytes_whole` over a ring: every rank passes on N-1 of N shares.

    Source: NVIDIA/nccl-tests, doc/PERFORMANCE.md (bus bandwidth of a ring).
    """
    return (ranks - 1) / ranks * bytes_whole / rate


def reduce_seconds(bytes_whole: Number, ranks: Number, rate: Number) -> Number:
    """All-reduce over a ring: reduce-scatter, then all-gather."""
    return 2 * gather_seconds(bytes_whole, ranks, rate)


def adam_bytes(weight: int, gradient: int, moment: int) -> int:
    """Bytes that fused Adam moves a parameter: weight, gradient and two moments read, all but the gradient written."""
    return (weight + gradient + 2 * moment) + (weight + 2 * moment)


def load_seconds(pixels: Number) -> Number:
    """Seconds in which one worker makes ready pictures of so many pixels: decoding and one resizing."""
    return pixels / DECODED_PIXELS + pixels / RESIZED_PIXELS


def step_time(work: StepWork, rates: Rates) -> StepTime:
    """Seconds of one optimizer step. Arrays in either argument broadcast; every part of the result does, too."""
    count = work.micro_batches
    speed = rates.products * rates.product_share
    memory = rates.memory * rates.memory_share
    products, recompute = count * work.flops / speed, count * work.recompute_flops / speed
    elementwise = count * work.elementwise_bytes / memory
    busy = products + recompute + elementwise
    # The host runs ahead of the GPU; where launching takes longer than the work, the GPU waits for the rest.
    calling = work.kernels * rates.launch_seconds + work.engine_calls * rates.call_seconds
    launch = np.maximum(count * calling - busy, 0.0)
    optimizer = work.optimizer_bytes / memory
    links = _links(work, rates)
    offload = _offload(work, rates)
    host = work.host_optimizer_bytes / rates.host_step
    computing = busy + launch
    shown_links = _shown(links, work.hidden_links, computing * work.link_window)
    shown_offload = _shown(offload, work.hidden_offload, computing)
    inside = computing + optimizer + shown_links + shown_offload + host
    loading = np.maximum(count * work.load_seconds / work.workers - inside, 0.0)
    parts: dict[str, Number] = {
        "products": products,
        "recompute": recompute,
        "elementwise": elementwise,
        "launch": launch,
        "optimizer": optimizer,
        "links": shown_links,
        "offload": shown_offload,
        "host optimizer": host,
        "loading": loading,
    }
    alone = computing + optimizer + host
    load = count * work.load_seconds / work.workers
    least = np.maximum(alone + _shown(links, 1.0, computing * work.link_window) + _shown(offload, 1.0, computing), load)
    return StepTime(inside + loading, least, alone + links + offload + load, parts)


def _links(work: StepWork, rates: Rates) -> Number:
    """Seconds of all collectives of a step."""
    each = work.gathered_bytes + work.scattered_bytes
    once = work.step_gathered_bytes + work.step_scattered_bytes + 2 * work.step_reduced_bytes
    return gather_seconds(work.micro_batches * each + once, work.ranks, rates.ring)


def _offload(work: StepWork, rates: Rates) -> Number:
    """Seconds of PCIe traffic of a step. PCIe carries both directions at once, but the phases that need them differ."""
    down = work.micro_batches * work.down_bytes + work.step_down_bytes
    up = work.micro_batches * work.up_bytes + work.step_up_bytes
    return (down + up) / rates.host_link


def _shown(seconds: Number, hidden: Number, beside: Number) -> Number:
    """What is left of `seconds` when a share of it runs beside computation, which must last long enough to hide it."""
    return seconds - np.minimum(seconds * hidden, beside)
