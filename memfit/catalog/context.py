"""What a CUDA process takes outside torch's allocator. Cited, not measured: no GPU has confirmed these yet."""

from __future__ import annotations

from memfit.specs.hardware import Hardware
from memfit.units import MIB

# CUDA context with lazily loaded modules, the default since CUDA 12.2: 287 MB where eager loading took 667.
CONTEXT = ("context.cuda", 287 * 10**6, "cited, not measured: pytorch/pytorch#86509, CUDA_MODULE_LOADING=LAZY")

# cuBLAS and cublasLt load their kernels on first use; published figures of a whole process are higher than the context.
LIBRARIES = (
    "context.libraries",
    128 * MIB,
    "cited, not measured: invoke-ai/InvokeAI#9447 finds 128 to 256 MiB for context and libraries; the lower end is "
    "taken beside the context above",
)

# NCCL's buffers are outside torch's allocator, linear in channels and communicators. One communicator is counted.
NCCL_TWO = ("comm.nccl", 544 * MIB, "cited, not measured: NVIDIA/nccl#964, a group of 2 on A100 with NVLink")
NCCL_MORE = (
    "comm.nccl",
    688 * MIB,
    "cited, not measured: NVIDIA/nccl#964, a group of more than 2 on 4 x A100 with NVLink",
)


def outside(hardware: Hardware) -> tuple[tuple[str, int, str, str], ...]:
    """(id, bytes, source, place) of what a process on these GPUs takes outside torch's allocator."""
    if hardware.gpu is None:
        return ()
    found = [(*row, "context") for row in (CONTEXT, LIBRARIES)]
    if hardware.ranks > 1:
        found.append((*(NCCL_TWO if hardware.ranks == 2 else NCCL_MORE), "comm"))
    return tuple(found)
