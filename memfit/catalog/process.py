"""What a training process takes in host memory before any model: measured, so that host RAM is no afterthought."""

from __future__ import annotations

# Resident set after `import memfit.engine.train` and the model classes, one process, Linux x86-64.
PROCESS = (
    406 * 10**6,
    "measured 2026-11-21 (/proc/self/smaps_rollup: Rss): Python 3.11, torch 2.13.0+cpu, transformers 5.23.0, "
    "accelerate, PEFT; the libraries of a CUDA build come on top and are not measured",
)
# What a forked data-loader worker has to itself after it has run for a moment.
WORKER = (
    112 * 10**6,
    "measured 2026-11-21 (/proc/PID/smaps_rollup: Private_Clean + Private_Dirty): a fork of the process above, where "
    "counting references makes pages private",
)
