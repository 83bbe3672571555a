"""What the process itself is set to: allocator, autocast, loader, seeds, evaluation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from memfit.catalog.precisions import PRECISIONS
from memfit.engine.readback.handles import fsdp_modules
from memfit.engine.readback.live import Asked, Live
from memfit.engine.readback.parameters import wanted_dtypes
from memfit.engine.readback.reading import Reading, compared, stated
from memfit.engine.readback.seen import OUTSIDE, Seen


def read(live: Live, asked: Asked) -> Iterator[Reading]:
    """Allocator, loader, seeds, evaluation and saves."""
    yield _allocator(live, asked)
    yield from _loader(live, asked)
    yield _seed(live, asked)
    yield _evaluation(live)
    yield from _run(live, asked)


def _allocator(live: Live, asked: Asked) -> Reading:
    wanted = asked.lever("allocator")
    if live.device.type != "cuda":
        return stated("levers.allocator", "none", "CPU ranks have no caching allocator", wanted)
    settings = torch.cuda.memory._snapshot()["allocator_settings"]
    backend = torch.cuda.memory.get_allocator_backend()
    found = "expandable" if settings.get("expandable_segments") else "default"
    found = found if backend == "native" else f"{found}, backend {backend}"
    evidence = f"torch.cuda.memory._snapshot: {settings.get('PYTORCH_CUDA_ALLOC_CONF') or 'no setting'}"
    return compared(
        "levers.allocator", wanted, found, evidence, "PYTORCH_CUDA_ALLOC_CONF must be set before torch starts"
    )


def _loader(live: Live, asked: Asked) -> Iterator[Reading]:
    loader: Any = getattr(live.trainer.callback_handler, "train_dataloader", None)
    if loader is None:
        yield stated("loader.workers", "unknown", "the trainer has made no loader yet")
        return
    workers, where = int(loader.num_workers), type(loader).__name__
    wanted = asked.key("loader.workers")
    fix = "dataloader_* of TrainingArguments follow the recipe's loader"
    yield compared(
        "loader.workers", None if wanted is None else str(wanted), str(workers), f"num_workers of {where}", fix
    )
    if workers:
        wanted = asked.key("loader.prefetch")
        found = str(loader.prefetch_factor)
        yield compared(
            "loader.prefetch", None if wanted is None else str(wanted), found, f"prefetch_factor of {where}", fix
        )
    wanted, pinned = asked.key("loader.pin"), bool(loader.pin_memory)
    if live.device.type == "cpu":  # transformers.TrainingArguments.__post_init__ takes it back
        asked_text = None if wanted is None else str(bool(wanted))
        yield stated("loader.pin", str(pinned), "CPU ranks copy to no GPU: nothing is pinned", asked_text)
        return
    yield compared(
        "loader.pin", None if wanted is None else str(bool(wanted)), str(pinned), f"pin_memory of {where}", fix
    )


def _seed(live: Live, asked: Asked) -> Reading:
    args, wanted = live.trainer.args, asked.key("seed")
    loader: Any = getattr(live.trainer.callback_handler, "train_dataloader", None)
    sampler = _sampler(loader)
    of_sampler = getattr(sampler, "initial_seed", None)
    found = {int(args.seed), int(args.seed if args.data_seed is None else args.data_seed)}
    found |= {int(of_sampler)} if of_sampler is not None else set()
    return compared(
        "seed",
        None if wanted is None else str(wanted),
        ", ".join(map(str, sorted(found))),
        f"seeds of the arguments and of {type(sampler).__name__}",
        "seed is one number for weights, adapters, dropout and the order of samples",
    )


def _sampler(loader: Any) -> Any:
    """The innermost sampler: the one that decides the order."""
    sampler: Any = getattr(loader, "sampler", None)
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    sampler = getattr(batches, "sampler", sampler)
    return getattr(sampler, "_order", sampler)


def _evaluation(live: Live) -> Reading:
    """Evaluation that gathers logits on the device is what ends runs after hours."""
    args = live.trainer.args
    metrics = getattr(live.trainer, "compute_metrics", None) is not None
    only_loss = bool(args.prediction_loss_only) or not metrics
    moves = args.eval_accumulation_steps is not None
    found = (
        "the loss alone"
        if only_loss
        else "logits, moved to the host"
        if moves
        else "logits of all samples, on the device"
    )
    return Reading(
        "evaluation keeps",
        "the loss alone",
        found,
        only_loss or moves,
        f"prediction_loss_only {args.prediction_loss_only}, compute_metrics {metrics}, "
        f"eval_accumulation_steps {args.eval_accumulation_steps}",
        "prediction_loss_only=True, or preprocess_logits_for_metrics with eval_accumulation_steps",
    )


def _run(live: Live, asked: Asked) -> Iterator[Reading]:
    args = live.trainer.args
    wanted = asked.key("run.keep")
    yield compared(
        "run.keep",
        None if wanted is None else str(wanted),
        str(args.save_total_limit),
        "save_total_limit of the arguments",
        "run.keep is the only place that says how many checkpoints stay",
    )


def read_after(live: Live, asked: Asked, seen: Seen) -> Iterator[Reading]:
    """Autocast and compute dtypes as blocks saw them, and training mode."""
    yield _autocast(live, asked, seen)
    yield from _computes(asked, seen)
    yield Reading(
        "training mode",
        "on",
        "on" if seen.training else "off",
        seen.training,
        "model.training in every forward: dropout and checkpointing act in training mode only",
        "call model.train() before training",
    )


def _autocast(live: Live, asked: Asked, seen: Seen) -> Reading:
    found: dict[str, int] = defaultdict(int)
    for (_, dtype), calls in seen.autocast.items():
        found[dtype] += calls
    # Some modules close autocast for a step of their own (rotations): what most calls saw is the run's.
    text = max(found, key=lambda dtype: found[dtype]) if found else "off"
    wanted = None
    if asked.plan is not None and asked.lever("autocast") is not None:
        compute = PRECISIONS[str(asked.plan.recipe.levers.precision)].compute
        wanted = compute if asked.lever("autocast") else "off"
    fix = "bf16 and fp16 of the arguments follow levers.precision; ACCELERATE_MIXED_PRECISION must not be set"
    if fsdp_modules(live):  # accelerate.Accelerator._prepare_fsdp2 never comes to prepare_model, which wraps forward
        fix = "levers.precision: bf16-mixed, which FSDP2 runs by its own casts; accelerate opens no autocast around it"
    return compared(
        "levers.autocast",
        wanted,
        text,
        f"torch.get_autocast_dtype inside {sum(found.values())} calls of modules; accelerate's mixed precision is "
        f"{live.trainer.accelerator.mixed_precision}",
        fix,
    )


def _computes(asked: Asked, seen: Seen) -> Iterator[Reading]:
    """The dtype of products with weights, by part."""
    by_part: dict[str, dict[str, int]] = defaultdict(dict)
    for (part, dtype), calls in seen.computes.items():
        if part != OUTSIDE:
            by_part[part][dtype] = calls
    for part, dtypes in sorted(by_part.items()):
        lever, text = f"levers.precision ({part} computes)", ", ".join(sorted(dtypes))
        evidence = ", ".join(f"{calls} products with weights in {dtype}" for dtype, calls in sorted(dtypes.items()))
        if asked.plan is None:
            yield stated(lever, text, evidence)
            continue
        row, adapter = wanted_dtypes(asked.plan)
        allowed = {row.compute} | ({adapter} if asked.plan.recipe.method != "full" and not row.autocast else set())
        yield Reading(
            lever,
            row.compute,
            text,
            row.compute in dtypes and set(dtypes) <= allowed,
            evidence,
            "weights of this part, or autocast, have another dtype than levers.precision says",
        )
