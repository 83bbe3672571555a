"""Cross-entropy over the vocabulary: bytes for every logit, while the loss is made and taken back.

One logit is one number of [tokens, vocabulary]. At the length of a document these few bytes are the peak of a run that
is checkpointed: 8,192 tokens x 151,936 x 12 B = 13.9 GiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FP32 = 4


@dataclass(frozen=True)
class LossPath:
    """How a code base computes the loss from full logits.

    `kept_width`: bytes of a logit in the tensor that the model's `outputs` hold, None for the width of the logits.
    `shifted_copy`: the fp32 logits are copied once more, without the last position, for a moment of the forward.
    """

    name: str
    kept_width: int | None
    shifted_copy: bool
    source: str


PATHS: dict[str, LossPath] = {
    path.name: path
    for path in (
        LossPath(
            name="full-logits",
            kept_width=None,
            shifted_copy=False,
            source="transformers.loss.loss_utils:ForCausalLMLoss: logits.float() inside the loss, labels padded and "
            "logits whole; all its figures are measured by tests/unit/test_loss_bytes.py",
        ),
        LossPath(
            name="full-logits-2024",
            kept_width=FP32,
            shifted_copy=True,
            source="transformers of early 2024 (LlamaForCausalLM.forward): logits = logits.float() goes into outputs, "
            "and shift_logits = logits[..., :-1, :].contiguous(); confirmed by the slope of published runs over length",
        ),
    )
}


@dataclass(frozen=True)
class LossBytes:
    """Bytes at the largest moment of the loss's forward, after it, and at the largest moment of its backward."""

    forward_peak: Any
    after_forward: Any
    backward_peak: Any


def loss_bytes(logits: Any, width: int = 2, outputs_alive: bool = False, path: str = "full-logits") -> LossBytes:
    """Bytes of cross-entropy over `logits` numbers (an int or an array) of `width` bytes each.

    Per 16-bit logit: 10 for a moment of the forward, 6 after it while `outputs` still hold the logits, 14 in the
    backward with `outputs_alive` and 12 once they are dropped, as transformers' Trainer does. The older path: 12, 8,
    16 and 12, for one position of every sequence less than there are.
    """
    row = PATHS[path]
    kept = width if row.kept_width is None else row.kept_width
    # log_softmax reads fp32: a copy of the kept logits, unless they are fp32 already and not shifted.
    read = FP32 if row.shifted_copy or kept != FP32 else 0
    saved = FP32
    # nll_loss's gradient and log_softmax's gradient exist at once, beside what log_softmax saved.
    gradients = FP32 + FP32
    return LossBytes(
        forward_peak=logits * (kept + read + saved),
        after_forward=logits * (kept + saved),
        backward_peak=logits * (saved + gradients + (kept if outputs_alive else 0)),
    )
