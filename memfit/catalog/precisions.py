"""Precisions: the dtypes of what learns, what is frozen and what the optimizer keeps.

A precision speaks of the parameters that learn. Frozen ones are 16 bit under every row but fp32 (4 bit where the method
quantises them); adapters follow `lora.dtype` unless the engine casts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rapidfuzz import fuzz, process

from memfit.errors import UserError
from memfit.specs.hardware import Hardware

ALONE = frozenset({"none", "ddp"})
ZERO = frozenset({"zero1", "zero2", "zero3"})
FSDP = frozenset({"fsdp"})

ACCELERATE_FSDP2 = "accelerate.utils.fsdp_utils:fsdp2_prepare_model (trainable shards are upcast to fp32)"
DEEPSPEED_MASTER = "deepspeed.runtime.zero.stage_1_and_2 and stage3 (a flat clone of the local partition)"


@dataclass(frozen=True)
class PrecisionRow:
    """Dtypes by torch's names. `master` is a second copy that the optimizer steps, or None.

    Gradients have the dtype of `learning`. The optimizer's states follow the copy it sees: `master` if there is one,
    else `learning`. `runs_on` lists the values of `levers.parallel`; `nearest` what to offer elsewhere.
    """

    name: str
    learning: str
    frozen: str
    compute: str
    master: str | None
    autocast: bool
    runs_on: frozenset[str]
    nearest: tuple[str, ...]
    source: str

    @property
    def gradients(self) -> str:
        return self.learning

    @property
    def stepped(self) -> str:
        """The dtype of the parameter that the optimizer sees."""
        return self.master or self.learning

    @property
    def dtypes(self) -> frozenset[str]:
        return frozenset({self.learning, self.frozen, self.compute})


_AMP = "torch.amp.autocast over fp32 parameters: zeros_like(parameter) makes fp32 states"

PRECISIONS: dict[str, PrecisionRow] = {
    row.name: row
    for row in (
        PrecisionRow(
            name="fp32",
            learning="float32",
            frozen="float32",
            compute="float32",
            master=None,
            autocast=False,
            runs_on=ALONE | ZERO | FSDP,
            nearest=("bf16-amp",),
            source="every tensor is fp32",
        ),
        PrecisionRow(
            name="fp16-amp",
            learning="float32",
            frozen="float16",
            compute="float16",
            master=None,
            autocast=True,
            runs_on=ALONE,
            nearest=("fp16-mixed", "bf16-amp"),
            source=_AMP,
        ),
        PrecisionRow(
            name="bf16-amp",
            learning="float32",
            frozen="bfloat16",
            compute="bfloat16",
            master=None,
            autocast=True,
            runs_on=ALONE | FSDP,
            nearest=("bf16-mixed", "fp16-amp", "fp16-mixed"),
            source=_AMP,
        ),
        PrecisionRow(
            name="fp16-mixed",
            learning="float16",
            frozen="float16",
            compute="float16",
            master="float32",
            autocast=False,
            runs_on=ZERO,
            nearest=("fp16-amp", "bf16-mixed", "bf16-amp"),
            source=DEEPSPEED_MASTER,
        ),
        PrecisionRow(
            name="bf16-mixed",
            learning="bfloat16",
            frozen="bfloat16",
            compute="bfloat16",
            master="float32",
            autocast=False,
            runs_on=ZERO | FSDP,
            nearest=("bf16-amp", "fp16-mixed", "fp16-amp"),
            source=DEEPSPEED_MASTER,
        ),
        PrecisionRow(
            name="pure-bf16",
            learning="bfloat16",
            frozen="bfloat16",
            compute="bfloat16",
            master=None,
            autocast=False,
            runs_on=ALONE | ZERO | FSDP,
            nearest=("fp16-amp", "fp16-mixed"),
            source="zeros_like(parameter) makes bf16 states; what transformers' Trainer does with a bf16 checkpoint",
        ),
    )
}


def precision_under(name: str, parallel: str) -> PrecisionRow:
    """The row as an engine realises it: FSDP shards in fp32, ZeRO keeps its own copy to step whatever the dtype."""
    row = PRECISIONS[name]
    if parallel in FSDP and name == "bf16-mixed":
        return replace(row, learning="float32", master=None, source=ACCELERATE_FSDP2)
    if parallel in ZERO and row.master is None:
        # With bf16_master_weights_and_grads the clone is 16 bit; without it, fp32 is cloned too.
        return replace(row, master=row.learning, source=DEEPSPEED_MASTER)
    return row


def opens_autocast(name: str, parallel: str) -> bool:
    """Whether forward and loss run under autocast. Under FSDP2 they do not: its policy casts what modules compute with
    (accelerate.accelerator:Accelerator._prepare_fsdp2 opens none)."""
    return PRECISIONS[name].autocast and parallel not in FSDP


def find_precision(name: str) -> PrecisionRow:
    """The row of a precision. UserError naming the nearest."""
    if name in PRECISIONS:
        return PRECISIONS[name]
    near = process.extractOne(name, list(PRECISIONS), scorer=fuzz.ratio)
    raise UserError(f"unknown precision {name!r}", f"did you mean {near[0]}? All: {', '.join(PRECISIONS)}")


def supported(row: PrecisionRow, hardware: Hardware) -> bool:
    """Whether the GPUs compute in the row's dtypes. CPU ranks do all of them."""
    return hardware.gpu is None or hardware.gpu.has_bf16 or "bfloat16" not in row.dtypes


def nearest_precision(row: PrecisionRow, parallel: str, hardware: Hardware) -> str | None:
    """The precision most like `row` that runs with `parallel` on these GPUs."""
    candidates: Iterable[str] = (*row.nearest, "fp32")
    return next(
        (name for name in candidates if parallel in PRECISIONS[name].runs_on and supported(PRECISIONS[name], hardware)),
        None,
    )
