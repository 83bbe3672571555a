"""The loss: over the full logits, in chunks of tokens that keep none, or in one fused kernel.

All three average over the tokens that carry loss in the whole batch, and take the model's `outputs` and its labels, as
transformers' Trainer hands them to a loss function. For the last two the model's head is put off (`DeferredHead`): it
hands its hidden states on, and the loss multiplies a chunk of them at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers.loss.loss_utils import ForCausalLMLoss

from memfit.errors import UserError

# (outputs, labels (B, T), tokens that carry loss in the whole batch) -> loss
Loss = Callable[..., torch.Tensor]
# (hidden (N, D), weight (V, D), targets (N), bias (V)) -> sum of cross-entropies, as the fused kernel of Liger
FusedKernel = Callable[..., torch.Tensor]

# (hidden (N, D), weight (V, D), bias (V)) -> what a loss makes of them
Compute = Callable[..., torch.Tensor]

IGNORED = -100  # torch.nn.CrossEntropyLoss's ignore_index: no loss at this place
# Tokens of a chunk: its logits take 12 bytes a number at their peak, 0.9 GB for a vocabulary of 151,936. Smaller chunks
# add up a learning head's gradient in more steps, each of which rounds.
CHUNK = 512
# The value of config.json by which some classes bend the logits behind their head; a loss that makes its own logits
# would miss it. Sources: modeling_{gemma2, gemma3}: *ForCausalLM.forward. A factor (cohere's logit_scale, granite's
# logits_scaling) then falls on the hidden states, which comes to the same where the head has no bias.
_BENT, _FACTORS = "final_logit_softcapping", ("logit_scale", "logits_scaling")


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


class DeferredHead(nn.Linear):
    """A model's output projection that hands its input on, and multiplies only when told how.

    It holds the head's own parameters, under their own names: tied weights stay tied, and saved files stay the same.
    """

    def __init__(self, head: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias = head.weight, head.bias

    def forward(self, input: torch.Tensor, compute: Compute | None = None) -> torch.Tensor:
        """`compute` gets the weights from here, so that engines which gather them when a module runs do so."""
        return input if compute is None else compute(input, self.weight, self.bias)


def defer_head(model: nn.Module) -> DeferredHead:
    """Put the model's head off. Raises UserError for a model whose logits are not its head's results."""
    head = model.get_output_embeddings()
    text = model.config.get_text_config()
    why = None
    if not isinstance(head, nn.Linear):
        why = f"has a {type(head).__name__} for its head"
    elif getattr(text, _BENT, None) is not None:
        why = f"bends its logits behind the head ({_BENT}: {getattr(text, _BENT)})"
    elif head.bias is not None and any(hasattr(text, name) for name in _FACTORS):
        why = "scales its logits behind a head with a bias"
    if why is not None or not isinstance(head, nn.Linear):
        raise UserError(
            f"levers.loss: {type(model).__name__} {why}, so only full logits give its loss", "levers.loss: full-logits"
        )
    deferred = DeferredHead(head)
    name = next(name for name, module in model.named_modules() if module is head)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, deferred)
    return deferred


@dataclass(frozen=True)
class _HeadLoss:
    """What both losses without kept logits share. `autocast`: the dtype of the model's products, None without it."""

    head: DeferredHead
    autocast: torch.dtype | None

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As `causal_loss`; `outputs.logits` are the hidden states (B, T, D) before the head.

        Only positions that carry loss reach the head.
        """
        hidden_BTD = outputs.logits
        targets_N = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten().to(hidden_BTD.device)
        places_M = (targets_N != IGNORED).nonzero().squeeze(1)
        hidden_MD = hidden_BTD.flatten(0, 1).index_select(0, places_M)
        total = self.summed(hidden_MD, targets_N[places_M])
        if num_items_in_batch is None:
            return total / len(places_M)
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    def summed(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum of the cross-entropies of M positions. hidden: (M, D), targets: (M)."""
        raise NotImplementedError

    def through_head(self, hidden: torch.Tensor, compute: Compute) -> torch.Tensor:
        """`compute` with the head's weights, which engines that split them gather around this one call.

        FSDP2 keeps the head gathered from the model's forward to its backward (accelerate.utils.fsdp_utils:
        fsdp2_prepare_model), and its hooks count the calls of a head that shares a group with others: it gets none.
        """
        run: Compute = self.head.forward if isinstance(self.head, FSDPModule) else self.head
        total: torch.Tensor = run(hidden, compute)
        return total

    def casting(self, device: torch.device) -> AbstractContextManager[Any]:
        """The head computes as it would inside the model."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, dtype=self.autocast)


@dataclass(frozen=True)
class ChunkedLoss(_HeadLoss):
    """Logits of CHUNK positions at a time, computed once for the loss and once more for its gradient.

    `contexts`: () -> what runs around a chunk's first and second computation.
    """

    chunk: int = CHUNK
    contexts: Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]] = noop_context_fn

    def summed(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # One call of the head for all chunks: ranks have different numbers of them, and gather the head together.
        return self.through_head(hidden, functools.partial(self._in_chunks, targets=targets))

    def _in_chunks(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        # One empty chunk where nothing is trained, so that the loss has a graph all the same.
        for first in range(0, max(1, len(targets)), self.chunk):
            piece = slice(first, first + self.chunk)
            given = (hidden[piece], weight, bias, targets[piece])
            total = total + checkpoint(
                self._of_chunk, *given, use_reentrant=False, preserve_rng_state=False, context_fn=self.contexts
            )
        return total

    def _of_chunk(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        with self.casting(hidden.device):
            logits_CV = functional.linear(hidden, weight, bias)
        return functional.cross_entropy(logits_CV.float(), targets, reduction="sum")


@dataclass(frozen=True)
class FusedLoss(_HeadLoss):
    """Liger's kernel: it makes the gradients of hidden states and head while it makes the loss, and keeps no logits."""

    kernel: FusedKernel

    def summed(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.autocast is not None:
            # Trainer's outputs come back in fp32; the kernel would make every gradient as wide as its input.
            hidden = hidden.to(self.autocast)
        with self.casting(hidden.device):
            return self.through_head(hidden, lambda x, weight, bias: self.kernel(x, weight, targets, bias))


def liger_kernel() -> FusedKernel:
    """Liger's fused linear cross-entropy. Raises UserError where it is not installed."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise UserError(
            f"levers.loss: fused needs the package liger-kernel ({error})",
            "pip install liger-kernel, or levers.loss: chunked, which keeps no logits either",
        ) from error
    return functools.partial(liger_fused_linear_cross_entropy, reduction="sum")


def put_head_off(
    model: nn.Module, lever: str, autocast: torch.dtype | None, kernel: Callable[[], FusedKernel] = liger_kernel
) -> Loss:
    """The loss of a lever (full-logits | chunked | fused) for `model`, whose head is put off where the loss has it.

    Raises UserError for a head that cannot be put off, and for a kernel that is not there.
    """
    makers: Mapping[str, Callable[[DeferredHead], Loss]] = {
        "chunked": functools.partial(ChunkedLoss, autocast=autocast),
        "fused": lambda head: FusedLoss(head, autocast, kernel()),
    }
    return makers[lever](defer_head(model)) if lever in makers else causal_loss
