"""Methods: the one-word default for `parts`, and how frozen weights are stored."""

from __future__ import annotations

from dataclasses import dataclass

from memfit.catalog.precisions import ALONE, FSDP, ZERO


@dataclass(frozen=True)
class QuantRow:
    """How a 4-bit weight is stored: two weights a byte, and one scale (absmax) for every `block` weights.

    With double quantisation a scale is one byte, `nested_block` scales share an fp32 one, and `nested_bytes` come once
    a tensor. `code_bytes`: the code book, once a tensor.
    """

    name: str
    block: int
    scale_bytes: int
    nested_block: int | None
    nested_bytes: int
    code_bytes: int
    source: str


# 0.5 + 4/64 = 0.5625 bytes a weight.
NF4 = QuantRow(
    name="nf4",
    block=64,
    scale_bytes=4,
    nested_block=None,
    nested_bytes=0,
    code_bytes=16 * 4,
    source="bitsandbytes.functional:quantize_4bit, blocksize 64, fp32 absmax (code book: verified from memory)",
)
# 0.5 + 1/64 + 4/(64 x 256) = 0.5159 bytes a weight.
NF4_DOUBLE = QuantRow(
    name="nf4-double",
    block=64,
    scale_bytes=1,
    nested_block=256,
    nested_bytes=256 * 4,
    code_bytes=16 * 4,
    source="bitsandbytes.functional:quantize_4bit with compress_statistics: 8-bit absmax, its scales in blocks of 256 "
    "and a second code book of 256 fp32 values (first code book: verified from memory)",
)


@dataclass(frozen=True)
class MethodRow:
    """`parts` gives the default of each part, `other` that of the parts it does not name.

    `quantised_part`: its Linear weights are stored as `quant` says, output heads and embeddings excepted.
    `runs_today`: `memfit train` can run it, not only forecast it; `runs_on`: under which `levers.parallel`; `package`:
    what it needs beside memfit's own.
    """

    name: str
    parts: dict[str, str]
    other: str
    default_precision: str
    quant: QuantRow | None
    quantised_part: str | None
    needs_gpu: bool
    runs_today: bool
    source: str
    runs_on: frozenset[str] = ALONE | ZERO | FSDP
    package: str = ""


METHODS: dict[str, MethodRow] = {
    row.name: row
    for row in (
        MethodRow(
            name="full",
            parts={},
            other="full",
            default_precision="bf16-amp",
            quant=None,
            quantised_part=None,
            needs_gpu=False,
            runs_today=True,
            source="every part learns",
        ),
        MethodRow(
            name="lora",
            parts={"language": "lora"},
            other="frozen",
            default_precision="pure-bf16",
            quant=None,
            quantised_part=None,
            needs_gpu=False,
            runs_today=True,
            source="peft.LoraConfig; Hu et al. 2021 (arXiv 2106.09685)",
        ),
        MethodRow(
            name="qlora",
            parts={"language": "lora"},
            other="frozen",
            default_precision="pure-bf16",
            # transformers.BitsAndBytesConfig leaves bnb_4bit_use_double_quant off; the recipe has no key for it.
            quant=NF4,
            quantised_part="language",
            needs_gpu=False,
            runs_today=True,
            source="Dettmers et al. 2023 (arXiv 2305.14314); transformers.BitsAndBytesConfig(load_in_4bit=True)",
            # DeepSpeed flattens or splits parameters that are no floating-point numbers under none of its stages in a
            # way that bitsandbytes reads; FSDP2 leaves packed weights whole on every rank, against the forecast
            # (accelerate.utils.fsdp_utils:fsdp2_prepare_model).
            runs_on=ALONE,
            package="bitsandbytes",
        ),
    )
}


def default_mode(method: MethodRow, part: str) -> str:
    """How a part is trained when the recipe says nothing of it."""
    return method.parts.get(part, method.other)
