"""Stand-ins for fused kernels that no CPU runs: what each allocates, keeps and frees, in plain operators.

Their results are not the kernels'; only shapes, dtypes and lifetimes are. Each names the upstream code it follows.
"""

from __future__ import annotations

from typing import Any

import torch

from memfit.trace.flops import add_flops


class _LigerLinearCrossEntropy(torch.autograd.Function):
    """Liger's fused linear cross-entropy, reduction "sum".

    Source: liger_kernel.ops.fused_linear_cross_entropy (0.8.5): fused_linear_cross_entropy_forward, with chunks as
    `liger_chunk` has them, one buffer for the logits of a chunk where nothing is to be cast, and gradients added up in
    place in the head's own dtype (compute capability 8.0 and above; older GPUs take a head-sized fp32 temporary more).
    Kept from forward to backward: the gradients of hidden states and head; backward scales them in place.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        count, vocabulary = hidden.shape[0], weight.shape[0]
        chunk = liger_chunk(count, hidden.shape[1], vocabulary)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
        grad_bias = torch.zeros_like(bias) if bias is not None else None
        losses_N = torch.zeros(count, dtype=torch.float32)
        cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        plain = hidden.dtype == weight.dtype == cast
        buffer_CV = torch.empty(chunk, vocabulary, dtype=cast) if plain else None
        for first in range(0, count, chunk):
            piece_CD = hidden[first : first + chunk]
            if buffer_CV is None:
                logits_CV = piece_CD @ weight.t()
                grad_hidden[first : first + chunk] = logits_CV @ weight
            else:
                logits_CV = buffer_CV[: len(piece_CD)]
                torch.mm(piece_CD, weight.t(), out=logits_CV)
                torch.mm(logits_CV, weight, out=grad_hidden[first : first + chunk])
            if grad_weight is not None and plain:
                grad_weight.addmm_(logits_CV.t(), piece_CD)
            elif grad_weight is not None:
                # A 16-bit product is added to fp32 in place, which no CPU operator does.
                grad_weight.add_(0)
                add_flops(2 * len(piece_CD) * weight.numel())
            if grad_bias is not None:
                grad_bias.add_(logits_CV.sum(0))
            del logits_CV
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.saved_tensors


def liger_chunk(tokens: int, hidden: int, vocabulary: int) -> int:
    """Tokens of a chunk: about as many logits as there are hidden values, the next power of two."""
    wanted = -(-tokens // -(-vocabulary // hidden))
    return max(1, min(1 << max(0, wanted - 1).bit_length(), tokens))


def liger_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: Any = None) -> torch.Tensor:
    """In the place of `liger_kernel.transformers.functional:liger_fused_linear_cross_entropy`, reduction "sum"."""
    loss: torch.Tensor = _LigerLinearCrossEntropy.apply(hidden, weight, bias)
    return loss
