"""The rules of thumb that every course teaches, worked out with the same physics as a forecast.

Each claim says what is taught, what memfit's functions give, by which formula, and what the rule leaves out. The table
in docs/physics.md is written from here. Textbooks count in GB (10^9 bytes), and so do these; memfit prints GiB (2^30).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memfit.physics.memory import PartStates, Shape, numel, share
from memfit.units import DTYPE_BYTES

GB = 10**9
SEVEN_B = 7 * GB


@dataclass(frozen=True)
class Claim:
    """`taught`: the figure as a course prints it; `value` computes ours, exactly, and `shown` is how it is printed."""

    id: str
    what: str
    taught: str
    value: Callable[[], float]
    shown: str
    formula: str
    leaves_out: str

    def text(self) -> str:
        return self.shown.format(self.value())


def training_states(
    parameters: int, dtype: str, master: str | None = None, split: tuple[int, int, int] = (1, 1, 1)
) -> PartStates:
    """Weights, gradients and Adam's two moments of one rank, for a model of `parameters` that all learn.

    `dtype` is that of weights and gradients; `master` that of a second copy of the weights which Adam steps. Moments
    have the dtype of what is stepped. `split`: ways in which weights, gradients and optimizer states are divided.
    """
    weights, gradients, stepped = (share(parameters, ways) for ways in split)
    width, state_width = _width(dtype), _width(master or dtype)
    return PartStates(
        part="model",
        learning=weights,
        width=width,
        gradients=gradients,
        master=stepped if master else 0,
        master_width=_width(master) if master else 0,
        optimizer=2 * state_width * stepped,
    )


def mixed(parameters: int, split: tuple[int, int, int] = (1, 1, 1)) -> dict[str, int]:
    """Bytes of each kind of state in mixed precision: 16-bit weights and gradients, fp32 master weights and moments."""
    return training_states(parameters, "float16", "float32", split).bytes()


def zero_split(stage: int, ranks: int) -> tuple[int, int, int]:
    """Ways in which ZeRO's stage divides weights, gradients and optimizer states (arXiv:1910.02054, section 5)."""
    return (ranks if stage == 3 else 1, ranks if stage >= 2 else 1, ranks if stage >= 1 else 1)


def zero_saving(stage: int, ranks: int, parameters: int = SEVEN_B) -> float:
    """How many times less one rank holds than without ZeRO, in mixed precision."""
    return sum(mixed(parameters).values()) / sum(mixed(parameters, zero_split(stage, ranks)).values())


def image_bytes(shape: Shape, dtype: str = "uint8", batch: int = 1) -> int:
    """Bytes of a batch of decoded pictures of this shape."""
    return batch * numel([shape]) * _width(dtype)


def _width(dtype: str) -> int:
    return int(DTYPE_BYTES[dtype])


def _fp32(kind: str) -> float:
    return training_states(SEVEN_B, "float32").bytes()[kind] / GB


def _half(kind: str) -> float:
    return mixed(SEVEN_B)[kind] / GB


def _adam() -> float:
    states = mixed(SEVEN_B)
    return (states["master"] + states["optimizer"]) / GB


def _total() -> float:
    return sum(mixed(SEVEN_B).values()) / GB


VOLUME: Shape = (512, 512, 512)

WEIGHTS_LEFT_OUT = "buffers, and the allocator's rounding; parameter counts are rarely round (Llama 2 7B: 6.74 B)"
ADAM_LEFT_OUT = (
    "the states appear at the first step, not at loading; one group's temporaries during the step; 8-bit and factored "
    "optimizers; parts that are frozen have none"
)
NOT_DIVIDED = "activations are not divided"
ZERO_LEFT_OUT = {
    1: f"reduce buckets, step temporaries, and in DeepSpeed a copy of the gradients that are owned; {NOT_DIVIDED}",
    2: f"reduce buckets and step temporaries; {NOT_DIVIDED}",
    3: f"modules gathered for the moment, prefetch and reduce buckets, step temporaries; {NOT_DIVIDED}",
}
IMAGE_LEFT_OUT = (
    "the workers' prefetched batches, pinned copies rounded up to powers of two, and what the model makes of it"
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "weights.fp32",
        "weights of a 7 B model, fp32",
        "28 GB",
        lambda: _fp32("weights"),
        "{:,.0f} GB",
        "7e9 x 4 B",
        WEIGHTS_LEFT_OUT,
    ),
    Claim(
        "weights.fp16",
        "weights of a 7 B model, fp16 or bf16",
        "14 GB",
        lambda: _half("weights"),
        "{:,.0f} GB",
        "7e9 x 2 B",
        WEIGHTS_LEFT_OUT,
    ),
    Claim(
        "gradients.fp32",
        "gradients, fp32",
        "28 GB",
        lambda: _fp32("gradients"),
        "{:,.0f} GB",
        "7e9 x 4 B",
        "they live only from the backward pass to the step, unless micro-batches are accumulated; DDP's buckets are a "
        "second copy",
    ),
    Claim(
        "gradients.fp16",
        "gradients, 16 bit",
        "14 GB",
        lambda: _half("gradients"),
        "{:,.0f} GB",
        "7e9 x 2 B",
        "as above; engines may add up in fp32 (4 B)",
    ),
    Claim(
        "adam.mixed",
        "Adam in mixed precision: master weights and two moments",
        "84 GB",
        _adam,
        "{:,.0f} GB",
        "7e9 x (4 + 4 + 4) B",
        ADAM_LEFT_OUT,
    ),
    Claim(
        "total.mixed",
        "all states in mixed precision",
        "112 GB",
        _total,
        "{:,.0f} GB",
        "7e9 x (2 + 2 + 12) B",
        "activations, logits, buffers, the allocator, the CUDA context",
    ),
    Claim(
        "adam.share",
        "Adam's share of all states",
        "75%",
        lambda: 100 * _adam() / _total(),
        "{:.0f}%",
        "12 / 16",
        "LoRA and frozen parts make it small, 8-bit moments lower it",
    ),
    Claim(
        "ratio.fp32",
        "weights : gradients : Adam, one precision",
        "1 : 1 : 2",
        lambda: _fp32("optimizer") / _fp32("weights"),
        "1 : 1 : {:.0f}",
        "4 : 4 : 8 B",
        "an order of size only: gradients need not live at the peak",
    ),
    Claim(
        "ratio.mixed",
        "weights : gradients : Adam, mixed precision, in numbers stored",
        "1 : 1 : 3",
        lambda: (mixed(SEVEN_B)["master"] + mixed(SEVEN_B)["optimizer"]) / _width("float32") / SEVEN_B,
        "1 : 1 : {:.0f}",
        "1 : 1 : (master + m + v); in bytes 2 : 2 : 12, which is 1 : 1 : 6",
        "the ratio of numbers is not that of bytes; pure bf16 has no master: 2 : 2 : 4",
    ),
    Claim(
        "inference",
        "inference with a 7 B model in fp16: weights only",
        "14 GB",
        lambda: _half("weights"),
        "{:,.0f} GB",
        "7e9 x 2 B",
        "the key and value cache of long contexts, the largest layer's activations, pictures",
    ),
    Claim(
        "zero1",
        "ZeRO-1 at many ranks",
        "4x",
        lambda: zero_saving(1, 10**6),
        "{:.2f}x",
        "16 / (2 + 2 + 12/N)",
        ZERO_LEFT_OUT[1],
    ),
    Claim(
        "zero2",
        "ZeRO-2 at many ranks",
        "8x",
        lambda: zero_saving(2, 10**6),
        "{:.2f}x",
        "16 / (2 + 14/N)",
        ZERO_LEFT_OUT[2],
    ),
    Claim(
        "zero3",
        "ZeRO-3 at 64 ranks",
        "N x",
        lambda: zero_saving(3, 64),
        "{:.2f}x",
        "16 / (16/N) = N",
        ZERO_LEFT_OUT[3],
    ),
    Claim(
        "image.one",
        "512 x 512 x 512 values, uint8",
        "134 MB",
        lambda: image_bytes(VOLUME) / 10**6,
        "{:,.0f} MB",
        "512^3 x 1 B = 128 MiB",
        IMAGE_LEFT_OUT,
    ),
    Claim(
        "image.batch",
        "a batch of 32 of them",
        "4.2 GB (cut, not rounded)",
        lambda: image_bytes(VOLUME, batch=32) / GB,
        "{:.3f} GB",
        "32 x 512^3 x 1 B = 4 GiB",
        IMAGE_LEFT_OUT,
    ),
    Claim(
        "image.float",
        "the same batch in float32",
        "four times that",
        lambda: image_bytes(VOLUME, "float32", batch=32) / GB,
        "{:.2f} GB",
        "32 x 512^3 x 4 B = 16 GiB",
        IMAGE_LEFT_OUT,
    ),
    Claim(
        "minicpm-o-2.6",
        "MiniCPM-o 2.6, loaded in bf16",
        "about 17 GB",
        lambda: sum(minicpm_o_2_6().values()) * _width("bfloat16") / GB,
        "{:.1f} GB",
        "8.7e9 x 2 B, by its parts",
        "the speech codec, the resampler's fp32 position table (70 MB), the CUDA context",
    ),
)


def minicpm_o_2_6() -> dict[str, int]:
    """Parameters of every part, from the sizes in its model card and class defaults.

    Source: Qwen2.5-7B (vocabulary 151,700), SigLIP-400M with 27 layers at 980 pixels, a resampler of 64 queries,
    Whisper-medium's encoder, ChatTTS of 20 layers; openbmb/MiniCPM-o-2_6 README and its configuration class.
    """
    return {
        "language": _decoder(28, 3584, 18944, kv=512, attention_bias=True) + 2 * 151_700 * 3584,
        "vision": _encoder(27, 1152, 4304, key_bias=True) + _linear(3 * 14 * 14, 1152) + 4900 * 1152,
        "connector": 64 * 3584 + 1152 * 3584 + _linear(3584, 4 * 3584) + 3 * 2 * 3584 + 3584 * 3584,
        "audio": _encoder(24, 1024, 4096, key_bias=False)
        + _linear(3 * 80, 1024)
        + _linear(3 * 1024, 1024)
        + 1500 * 1024
        + _linear(1024, 3584)
        + _linear(3584, 3584),
        # Embeddings of text and of four codes, the decoder's own unused table, its heads, and the way in from Qwen.
        "tts": _decoder(20, 768, 3072, kv=768, attention_bias=False)
        + (21_178 + 4 * 626 + 32_000) * 768
        + 4 * 626 * (768 + 1)  # weight-normed: a direction and a length for each output
        + _linear(3584, 768)
        + _linear(768, 768),
    }


def _linear(inputs: int, outputs: int) -> int:
    return numel([(outputs, inputs), (outputs,)])


def _decoder(layers: int, hidden: int, feed_forward: int, kv: int, attention_bias: bool) -> int:
    """A Llama-like stack with its last norm: gated feed-forward, two RMS norms a layer."""
    attention = numel([(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)])
    biases = hidden + 2 * kv if attention_bias else 0
    return layers * (attention + biases + 3 * hidden * feed_forward + 2 * hidden) + hidden


def _encoder(layers: int, hidden: int, feed_forward: int, key_bias: bool) -> int:
    """A ViT-like stack with its last norm: plain feed-forward, two layer norms with bias a layer."""
    attention = 4 * _linear(hidden, hidden) - (0 if key_bias else hidden)
    return (
        layers * (attention + _linear(hidden, feed_forward) + _linear(feed_forward, hidden) + 4 * hidden) + 2 * hidden
    )
