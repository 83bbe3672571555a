"""What training processes take in host memory beside any tensor: measured, so that host RAM is no afterthought.

Measured 2026-11-22 by adding up /proc/PID/smaps_rollup of every process of `memfit train` (3 steps of a model of 0.6
MiB, one process, and two under ddp, fsdp, zero2 and zero3): Python 3.11, torch 2.13.0+cpu, transformers 5.23.0,
accelerate 1.15.0, PEFT 0.21.2, DeepSpeed 0.19.8 (which accelerate imports wherever it is installed), Linux x86-64.
"""

from __future__ import annotations

_HOW = "measured 2026-11-22 (/proc/PID/smaps_rollup of memfit train"

# What each rank has to itself after a few steps: 337 to 339 MB with one process or two, ddp or fsdp.
PROCESS = (
    338 * 10**6,
    f"{_HOW}: Private_Dirty of a rank): interpreter, torch's CPU build, transformers, PEFT, Trainer",
)
# Pages of the same files, which all processes of a node share.
LIBRARIES = (150 * 10**6, f"{_HOW}: Shared_Clean, 147 to 151 MB, the same pages in every rank)")
# The command itself, which has traced and then waits for its ranks.
LAUNCHER = (318 * 10**6, f"{_HOW}: Private_Dirty of the process that started two ranks)")
# DeepSpeed's engine, its compiled operators and their shared memory: 385 to 391 MB a rank, 8 MB of them buckets.
DEEPSPEED = (45 * 10**6, f"{_HOW}: a rank under zero2 and zero3, less that of a rank under ddp and less its buckets)")
# Above a CPU build: CUDA's driver and torch's CUDA libraries, their kernels loaded on first use.
CUDA = (
    220 * 10**6,
    "cited, not measured: pytorch/pytorch#113326 finds 438,632 kB resident after import torch and one CUDA tensor "
    "(torch 2.2, CUDA 11.8, lazy modules), of which 229 MB are a CPU build's import; cuBLAS, cuDNN and NCCL add to it: "
    "whole processes are shown at 1.3 to 1.6 GB (traceopt-ai/traceml#401)",
)
# What a forked data-loader worker has to itself after it has run for a moment.
WORKER = (
    112 * 10**6,
    "measured 2026-11-21 (/proc/PID/smaps_rollup: Private_Clean + Private_Dirty): a fork of a rank, where counting "
    "references makes pages private",
)
