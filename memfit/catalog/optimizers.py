"""Optimizers: one row each, with the bytes of state per trainable tensor as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rapidfuzz import fuzz, process

from memfit.catalog.precisions import ALONE, FSDP, ZERO
from memfit.errors import UserError

EVERYWHERE = ALONE | ZERO | FSDP
# bitsandbytes.functional: optimizer states in blocks of 256 with one fp32 absmax each.
BLOCK_8BIT = 256
# bitsandbytes.optim: min_8bit_size, below which a tensor keeps fp32 states.
MIN_8BIT_NUMEL = 4096
# memfit.engine.stochastic: elements that are stepped in fp32 at once, and their bytes at the peak (the first moment,
# the second, its root, and the bits of chance, 4 B each).
CHANCE_CHUNK, CHANCE_BYTES = 1 << 21, 16
CHANCE_WIDTH = 2  # of bf16: only its weights are rounded so
# bitsandbytes.optim.optimizer:Optimizer8bit.get_state_buffer: smaller states are not paged.
MIN_PAGED_NUMEL = 100_000


@dataclass(frozen=True)
class OptimizerRow:
    """One optimizer.

    `states` names the rule in `STATE_RULES` that turns a tensor into bytes; `moments` is its number of state tensors.
    `scalars`: fp32 scalars a tensor, on the GPU or (`scalars_on_host`) in host memory.
    `step_temporary`: "none", "state-copy" (one more copy of a moment of everything, during the step) or "unknown".
    `engine_name` is transformers' name for `TrainingArguments.optim`; `runs_today`: `memfit train` can run it;
    `package`: what it needs beside memfit's own.
    """

    name: str
    title: str
    states: str
    moments: int
    scalars: int
    scalars_on_host: bool
    step_temporary: str
    paged: bool
    runs_on: frozenset[str]
    needs_gpu: bool
    engine_name: str
    runs_today: bool
    source: str
    package: str = ""


def _like_parameter(row: OptimizerRow, shape: Sequence[int], width: int, kind: str) -> int:
    return row.moments * width * math.prod(shape)


def _fp32(row: OptimizerRow, shape: Sequence[int], width: int, kind: str) -> int:
    return row.moments * 4 * math.prod(shape)


def _blockwise_8bit(row: OptimizerRow, shape: Sequence[int], width: int, kind: str) -> int:
    numel = math.prod(shape)
    # transformers.Trainer.get_optimizer registers every nn.Embedding for 32-bit states.
    if numel < MIN_8BIT_NUMEL or kind == "embedding":
        return _fp32(row, shape, width, kind)
    return row.moments * (numel + 4 * math.ceil(numel / BLOCK_8BIT))


def _factored(row: OptimizerRow, shape: Sequence[int], width: int, kind: str) -> int:
    if len(shape) < 2:
        return 4 * math.prod(shape)
    rows, columns = math.prod(shape[:-1]), math.prod(shape[:-2]) * shape[-1]
    return 4 * (rows + columns)


STATE_RULES: dict[str, Callable[[OptimizerRow, Sequence[int], int, str], int]] = {
    "like-parameter": _like_parameter,
    "fp32": _fp32,
    "blockwise-8bit": _blockwise_8bit,
    "factored": _factored,
}

OPTIMIZERS: dict[str, OptimizerRow] = {
    row.name: row
    for row in (
        OptimizerRow(
            name="adamw",
            title="AdamW, fused",
            states="like-parameter",
            moments=2,
            scalars=1,
            scalars_on_host=False,
            step_temporary="none",
            paged=False,
            runs_on=EVERYWHERE,
            needs_gpu=False,
            engine_name="adamw_torch_fused",
            runs_today=True,
            source="torch.optim:AdamW(fused=True): exp_avg and exp_avg_sq by zeros_like, a step scalar on the device",
        ),
        OptimizerRow(
            name="adamw-foreach",
            title="AdamW, one list of tensors at a time",
            states="like-parameter",
            moments=2,
            scalars=1,
            scalars_on_host=True,
            step_temporary="state-copy",
            paged=False,
            runs_on=EVERYWHERE,
            needs_gpu=False,
            engine_name="adamw_torch",
            runs_today=True,
            source="torch.optim.adamw:_multi_tensor_adamw: the square roots of all second moments exist at once",
        ),
        OptimizerRow(
            name="adamw-8bit",
            title="AdamW with 8-bit states",
            states="blockwise-8bit",
            moments=2,
            scalars=0,
            scalars_on_host=False,
            step_temporary="none",
            paged=False,
            runs_on=ALONE,
            needs_gpu=True,
            engine_name="adamw_8bit",
            runs_today=True,
            source="bitsandbytes.optim:AdamW8bit; transformers.trainer keeps embeddings at 32 bit",
            package="bitsandbytes",
        ),
        OptimizerRow(
            name="paged-adamw-8bit",
            title="AdamW with 8-bit states in paged memory",
            states="blockwise-8bit",
            moments=2,
            scalars=0,
            scalars_on_host=False,
            step_temporary="none",
            paged=True,
            runs_on=ALONE,
            needs_gpu=True,
            engine_name="paged_adamw_8bit",
            runs_today=True,
            package="bitsandbytes",
            source="bitsandbytes.optim:PagedAdamW8bit: cudaMallocManaged, outside torch's allocator, evictable to host",
        ),
        OptimizerRow(
            name="adafactor",
            title="Adafactor without momentum",
            states="factored",
            moments=1,
            scalars=1,
            scalars_on_host=False,
            step_temporary="unknown",
            paged=False,
            runs_on=ALONE,
            needs_gpu=False,
            engine_name="adafactor",
            runs_today=True,
            source="transformers.optimization:Adafactor(beta1=None): fp32 row and column means, an fp32 RMS scalar",
        ),
        OptimizerRow(
            name="lion",
            title="Lion",
            states="fp32",
            moments=1,
            scalars=0,
            scalars_on_host=False,
            step_temporary="none",
            paged=False,
            runs_on=ALONE,
            needs_gpu=True,
            engine_name="lion_32bit",
            runs_today=False,
            source="bitsandbytes.optim:Lion: one fp32 state whatever the parameter's dtype",
        ),
        OptimizerRow(
            name="sgd",
            title="SGD without momentum",
            states="like-parameter",
            moments=0,
            scalars=0,
            scalars_on_host=False,
            step_temporary="unknown",
            paged=False,
            runs_on=EVERYWHERE,
            needs_gpu=False,
            engine_name="sgd",
            runs_today=True,
            source="torch.optim:SGD(momentum=0), which keeps no state; weight decay makes a copy",
        ),
    )
}


def state_bytes(row: OptimizerRow, shape: Sequence[int], width: int, kind: str) -> int:
    """Bytes of state of one tensor, scalars excepted. `width`: of an element of the copy that the optimizer sees."""
    return STATE_RULES[row.states](row, shape, width, kind)


def state_formula(row: OptimizerRow, shapes: Sequence[Sequence[int]], kinds: Sequence[str], width: int) -> str:
    """The sum of `state_bytes` over tensors with its numbers, for `--why`."""
    counts = [math.prod(shape) for shape in shapes]
    if row.states == "blockwise-8bit":
        small = [n < MIN_8BIT_NUMEL or kind == "embedding" for n, kind in zip(counts, kinds, strict=True)]
        large = [n for n, is_small in zip(counts, small, strict=True) if not is_small]
        blocks = sum(math.ceil(n / BLOCK_8BIT) for n in large)
        return (
            f"{row.moments} states x ({sum(large):,} x 1 B + {blocks:,} blocks of {BLOCK_8BIT} x 4 B + "
            f"{sum(counts) - sum(large):,} x 4 B), the last are embeddings and tensors below {MIN_8BIT_NUMEL:,}"
        )
    if row.states == "factored":
        vectors = sum(n for n, shape in zip(counts, shapes, strict=True) if len(shape) < 2)
        sides = sum(_factored(row, shape, width, "") for shape in shapes) // 4 - vectors
        return f"{sides:,} rows and columns x 4 B + {vectors:,} elements of vectors x 4 B"
    each = 4 if row.states == "fp32" else width
    return f"{row.moments} states of {sum(counts):,} parameters, {each} B each"


def is_paged(row: OptimizerRow, shape: Sequence[int]) -> bool:
    """Whether this tensor's states live in managed memory."""
    return row.paged and math.prod(shape) >= MIN_PAGED_NUMEL


def find_optimizer(name: str) -> OptimizerRow:
    """The row of an optimizer. UserError naming the nearest."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    near = process.extractOne(name, list(OPTIMIZERS), scorer=fuzz.ratio)
    raise UserError(f"unknown optimizer {name!r}", f"did you mean {near[0]}? All: {', '.join(OPTIMIZERS)}")


def rounds_by_chance(optimizer: str, precision: str) -> bool:
    """Whether bf16 weights are stepped by memfit's own AdamW, which rounds by chance (memfit.engine.stochastic).

    Only where the step is torch code: DeepSpeed's own host optimizer, under offload, rounds to nearest.
    """
    return optimizer == "adamw" and precision == "pure-bf16"
