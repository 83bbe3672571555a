"""What a CUDA process takes outside torch's allocator. Cited, not measured: no GPU has confirmed these yet."""

from __future__ import annotations

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
