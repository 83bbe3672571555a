"""The loss over the full logits, averaged over the tokens that carry loss in the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from transformers.loss.loss_utils import ForCausalLMLoss


def causal_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of the next token in fp32: the sum over trained tokens divided by `num_items_in_batch`.

    `num_items_in_batch` counts the trained tokens of all micro-batches of an optimizer step, so that accumulation gives
    the loss of one large batch. Some models take that number and some do not; computing the loss here makes them equal.
    None means the mean over this batch. `outputs.logits`: (B, T, V); `labels`: (B, T), -100 without loss.
    """
    logits_BTV = outputs.logits
    return ForCausalLMLoss(logits_BTV, labels, vocab_size=logits_BTV.shape[-1], num_items_in_batch=num_items_in_batch)
