"""Levers and the legal values that they are flipped to once the plan is made. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flip:
    """`planned`: recipe settings of the plan; `runs`: those of what is built, other by one lever."""

    planned: tuple[str, ...]
    runs: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{', '.join(self.planned) or 'as it is'} -> {', '.join(self.runs)}"


def each(key: str, *values: str, beside: tuple[str, ...] = ()) -> tuple[Flip, ...]:
    """Every ordered step from a value to the next one, and back from the last to the first."""
    following = (*values[1:], values[0])
    return tuple(Flip((*beside, f"{key}={a}"), (*beside, f"{key}={b}")) for a, b in zip(values, following, strict=True))


LORA = ("method=lora",)
# What differs between engines, and what an engine's own code could take over.
EVERYWHERE: tuple[Flip, ...] = (
    *each("levers.checkpointing", "none", "full"),
    *each("levers.optimizer", "adamw", "sgd"),
    *each("levers.loss", "full-logits", "chunked"),
    *each("levers.attention", "sdpa", "eager"),
    *each("levers.micro_batch", "1", "2"),
    *each("schedule.clip", "1", "0.5"),
    *each("schedule.kind", "cosine", "linear"),
    *each("schedule.learning_rate", "1e-3", "2e-3"),
    *each("schedule.weight_decay", "0", "0.1"),
    *each("parts.vision", "full", "frozen"),
)
# Not here: loader.pin, which CPU ranks have no use for; all-linear, which is auto on the tests' model; olora and
# orthogonal, which are not told apart from pissa.
ALONE: tuple[Flip, ...] = (
    *each("levers.precision", "fp32", "bf16-amp", "pure-bf16"),
    *each("levers.optimizer", "adamw", "adamw-foreach", "sgd", "adafactor"),
    *each("levers.checkpointing", "none", "selective", "full", "every-2"),
    *each("levers.loss", "full-logits", "chunked"),
    *each("levers.attention", "sdpa", "eager"),
    *each("levers.micro_batch", "1", "2"),
    *each("method", "full", "lora"),
    *each("parts.vision", "full", "frozen", "last-1"),
    *each("parts.connector", "full", "frozen"),
    *each("image.max_slices", "1", "2"),
    *each("image.downsample_mode", "16x", "4x"),
    *each("batch", "4", "8"),
    *each("seed", "0", "1"),
    *each("schedule.steps", "8", "9"),
    *each("schedule.kind", "cosine", "linear", "constant"),
    *each("schedule.warmup", "0", "0.5"),
    *each("schedule.learning_rate", "1e-3", "2e-3", '{"vision": 1e-3, "connector": 1e-4, "language": 1e-3}'),
    *each("schedule.weight_decay", "0", "0.1"),
    *each("schedule.betas", "[0.9, 0.999]", "[0.9, 0.95]"),
    *each("schedule.clip", "1", "0.5"),
    *each("loader.workers", "0", "1"),
    *each("loader.prefetch", "2", "3", beside=("loader.workers=1",)),
    *each("run.keep", "2", "3"),
    *each("lora.rank", "4", "8", beside=LORA),
    *each("lora.alpha", "64", "32", beside=LORA),
    *each("lora.dropout", "0", "0.5", beside=LORA),
    *each("lora.targets", "auto", '["q_proj", "v_proj"]', beside=LORA),
    *each("lora.variant", "lora", "rslora", "dora", beside=LORA),
    *each("lora.dtype", "fp32", "bf16", beside=LORA),
    *each("lora.init", "default", "gaussian", "pissa", beside=LORA),
)
# Run by `make test`: a lever that only steps show.
SHORT: tuple[Flip, ...] = (Flip(("levers.checkpointing=full",), ("levers.checkpointing=none",)),)
