"""The loss that runs: which head, over what it averages, and whether it kept the logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memfit.build.loss import ChunkedLoss, DeferredHead, FusedLoss, causal_loss
from memfit.engine.readback.live import Asked, Live
from memfit.engine.readback.reading import Reading, compared, stated
from memfit.engine.readback.seen import Seen

KINDS = {ChunkedLoss: "chunked", FusedLoss: "fused"}


def read(live: Live, asked: Asked) -> Iterator[Reading]:
    """The loss function and the head, and what the loss is a mean of."""
    function: Any = getattr(live.trainer, "compute_loss_func", None)
    deferred = [name for name, module in live.model.named_modules() if isinstance(module, DeferredHead)]
    found = KINDS.get(type(function), "full-logits")
    if deferred and found == "full-logits":
        found = "a head that is put off, and no loss that makes its logits"
    if not deferred and found != "full-logits":
        found += " beside a head that gives logits"
    name = getattr(function, "__name__", type(function).__name__) if function is not None else "the model's own"
    yield compared(
        "levers.loss",
        asked.lever("loss"),
        found,
        f"compute_loss_func is {name}; {deferred[0] + ' is put off' if deferred else 'the head gives logits'}",
        "levers.loss needs memfit's loss function and head together: neither may be replaced after build",
    )
    yield _mean(live, function, asked)


def _mean(live: Live, function: Any, asked: Asked) -> Reading:
    args, trainer = live.trainer.args, live.trainer
    counts = function is not None or bool(getattr(trainer, "model_accepts_loss_kwargs", False))
    over_ranks = int(args.world_size) == 1 or bool(args.average_tokens_across_devices)
    found = (
        "trained tokens of the whole batch"
        if counts and over_ranks
        else "trained tokens of each rank"
        if counts
        else "the mean of each micro-batch"
    )
    own = function is causal_loss or type(function) in KINDS
    return compared(
        "loss is a mean over",
        None if asked.plan is None else "trained tokens of the whole batch",
        found,
        f"{'memfit' if own else 'the model'}'s loss takes num_items_in_batch: {counts}; over all ranks: {over_ranks}",
        "average_tokens_across_devices=True, and a loss that divides by num_items_in_batch",
    )


def read_after(live: Live, asked: Asked, seen: Seen) -> Iterator[Reading]:
    """Whether logits were kept for backward."""
    if seen.logits is None:
        found, evidence = "not kept", "no tensor saved for backward had the vocabulary for its last side"
    else:
        size, shape, dtype = seen.logits
        found, evidence = "kept", f"the largest saved: {' x '.join(map(str, shape))} {dtype}, {size:,} B"
    lever = asked.lever("loss")
    if lever is None:
        yield stated("logits for backward", found, evidence)
        return
    yield compared(
        "logits for backward",
        "kept" if lever == "full-logits" else "not kept",
        found,
        evidence,
        "levers.loss: chunked keeps none; a metric or a second loss over outputs.logits would",
    )
