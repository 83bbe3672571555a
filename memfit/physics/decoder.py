"""Work of a plain decoder by formula, where nothing has been traced: for published runs of models that memfit lacks.

Shapes: T tokens of a row, D hidden, F feed-forward, K = key and value heads x head size, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from memfit.physics.speed import StepWork

# Bytes that eager transformers code reads and writes beside products, per token and layer in 16 bit, forward. A
# normalisation that goes through fp32: cast 2+4, square 4+4, mean 4, scale 4+4, cast 4+2, weight 2+2; two of them. Two
# residual sums of 4+2. Rotary embedding of queries and keys: two products, a negation, a sum. SiLU 2+2, gate 4+2.
# Source: transformers.models.llama.modeling_llama:LlamaRMSNorm, LlamaMLP, apply_rotary_pos_emb.
_PER_HIDDEN = 2 * 36 + 2 * 6
_PER_ROTATED = 16
_PER_FEED_FORWARD = 10
# A logit: written, cast to fp32, log-softmax and its backward, cast back.
_PER_LOGIT = 2 + 6 + 8 + 8 + 8 + 6
# Kernels of one such layer, forward, and of one adapted Linear beside it (cast, dropout, two products, scale, sum).
# Counted on transformers' Llama: 113 a layer for forward and backward, 145 with checkpointing, 217 and 309 with LoRA on
# five matrices. tests/unit/test_decoder_work.py counts again, bytes too.
_KERNELS, _ADAPTER_KERNELS = 40, 6
# Modules with parameters of their own in one layer: two normalisations, three to four matrices of attention, two to
# three of the feed-forward.
_MODULES = 8


@dataclass(frozen=True)
class DecoderShape:
    """A decoder. `gated`: three feed-forward matrices instead of two. `tied`: head and embedding are one."""

    hidden: int
    layers: int
    feed_forward: int
    vocabulary: int
    kv: int
    gated: bool = True

    @property
    def layer_parameters(self) -> int:
        """Elements of one layer's matrices."""
        matrices = 3 if self.gated else 2
        return 2 * self.hidden * (self.hidden + self.kv) + matrices * self.hidden * self.feed_forward

    @property
    def head_parameters(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """Elements of all matrices: layers, embedding and head."""
        return self.layers * self.layer_parameters + 2 * self.head_parameters


@dataclass(frozen=True)
class DecoderRun:
    """How it is trained: `rows` of `tokens`; `learning` the parameters whose gradients are computed.

    `attention`: "flash" computes the lower triangle only, "full" the whole square. `fused`: compiled, so that
    neighbouring elementwise operations read and write once: a third of the bytes. `adapters`: adapted Linears a layer,
    `adapter_parameters` those of all adapters. `by_module`: an engine fetches the parameters of each module.
    """

    tokens: int
    rows: int = 1
    learning: int = 0
    checkpointing: bool = True
    attention: str = "flash"
    fused: bool = False
    adapters: int = 0
    adapter_parameters: int = 0
    by_module: bool = False


def decoder_work(shape: DecoderShape, run: DecoderRun) -> StepWork:
    """One micro-batch: forward, backward through every layer, weight gradients of what learns.

    Products of forward: 2 x tokens x parameters, and of attention 4 T^2 D a layer (half under the triangle). Backward:
    the same for the inputs, once more for the weights that learn; attention twice.
    """
    tokens = run.tokens * run.rows
    triangle = 0.5 if run.attention == "flash" else 1.0
    attention = shape.layers * 4 * run.tokens * tokens * shape.hidden * triangle
    layers = 2 * tokens * shape.layers * shape.layer_parameters
    head = 2 * tokens * shape.head_parameters
    adapters = 2 * tokens * run.adapter_parameters
    forward = layers + head + attention + adapters
    backward = layers + head + 2 * attention + 2 * adapters + 2 * tokens * run.learning
    passes = 4 if run.checkpointing else 3  # forward, backward counts twice, and once more when recomputed
    return StepWork(
        flops=float(forward + backward),
        recompute_flops=float(layers + attention + adapters) if run.checkpointing else 0.0,
        elementwise_bytes=float(tokens * (_layer_bytes(shape, run) * passes + _PER_LOGIT * shape.vocabulary)),
        kernels=float(shape.layers * (_KERNELS + _ADAPTER_KERNELS * run.adapters) * passes),
        engine_calls=float(shape.layers * _MODULES * (passes - 1)) if run.by_module else 0.0,
    )


def _layer_bytes(shape: DecoderShape, run: DecoderRun) -> float:
    """Bytes a token of all layers, forward."""
    one = _PER_HIDDEN * shape.hidden + _PER_ROTATED * (shape.hidden + shape.kv) + _PER_FEED_FORWARD * shape.feed_forward
    return shape.layers * one * (1 / 3 if run.fused else 1.0)
