"""The learning rate's schedule, evaluated where the scheduler itself says it, and what else a step is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from memfit.engine.readback.handles import engine_of_deepspeed, zero_of
from memfit.engine.readback.live import Asked, Live
from memfit.engine.readback.optimizer import Group, base_rate, groups_of, innermost
from memfit.engine.readback.reading import Reading, compared, stated
from memfit.engine.readback.seen import Seen
from memfit.specs.plan import Plan


def read(live: Live, asked: Asked) -> Iterator[Reading]:
    """Kind and warm-up, length, clipping, batches, loss scaling."""
    yield _schedule(live, asked)
    yield _steers(live)
    yield _steps(live, asked)
    yield _clip(live, asked)
    yield from _batches(live, asked)
    yield _scaling(live, asked)


def factor(kind: str, step: int, warmup: int, total: int) -> float:
    """What a schedule multiplies the rate by at a step: linear warm-up, then cosine, linear or constant.

    Source: Loshchilov and Hutter 2017 (arXiv:1608.03983) for the cosine, half a period to zero.
    """
    if step < warmup:
        return step / max(1, warmup)
    left = (total - step) / max(1, total - warmup)
    if kind == "constant":
        return 1.0
    return max(0.0, left if kind == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left))))


def probes(warmup: int, total: int) -> list[int]:
    """Steps at which schedules that differ at all are unlike each other."""
    return sorted({0, 1, warmup // 2, warmup, (warmup + total) // 2, (warmup + 3 * total) // 4, total - 1, total})


def scheduler_of(live: Live) -> Any:
    """The scheduler that steps, inside accelerate's and DeepSpeed's wrappers."""
    engine = engine_of_deepspeed(live)
    scheduler: Any = getattr(engine, "lr_scheduler", None) or live.trainer.lr_scheduler
    while hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    return scheduler


def _schedule(live: Live, asked: Asked) -> Reading:
    scheduler, fix = scheduler_of(live), "remove the scheduler block from the engine's configuration: it replaces this"
    lambdas = getattr(scheduler, "lr_lambdas", None)
    where = f"{type(scheduler).__module__}.{type(scheduler).__qualname__}"
    plan = asked.plan
    if not lambdas:
        if plan is None:
            return stated("schedule.kind", type(scheduler).__name__, f"{where} has no lambda to evaluate")
        return Reading("schedule.kind", _kind_text(plan), type(scheduler).__name__, False, f"{where}, no lambda", fix)
    if plan is None:
        total = int(live.trainer.args.max_steps)
        text = ", ".join(f"{step}: {lambdas[0](step):.4f}" for step in probes(total // 10, total))
        return stated("schedule.kind", text, f"{where} evaluated at steps of {total}")
    total = asked.facts.total_steps or int(live.trainer.args.max_steps)
    warmup = round(plan.recipe.schedule.warmup * total)
    wanted = [factor(plan.recipe.schedule.kind, step, warmup, total) for step in probes(warmup, total)]
    found = [[float(each(step)) for step in probes(warmup, total)] for each in lambdas]
    wrong = [
        values
        for values in found
        if not all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(values, wanted, strict=True))
    ]
    pairs = ", ".join(f"{s}: {v:.4f}" for s, v in zip(probes(warmup, total), (wrong or found)[0], strict=True))
    return Reading(
        "schedule.kind",
        _kind_text(plan) + f": {', '.join(f'{value:.4f}' for value in wanted)}",
        ", ".join(f"{value:.4f}" for value in (wrong or found)[0]),
        not wrong and len(lambdas) == len(innermost(live.trainer.optimizer).param_groups),
        f"{len(lambdas)} lambdas of {where}, evaluated at steps of {total} ({pairs})",
        fix,
    )


def _kind_text(plan: Plan) -> str:
    return f"{plan.recipe.schedule.kind}, warm-up {plan.recipe.schedule.warmup:g}"


def _steers(live: Live) -> Reading:
    """The scheduler must write into the groups that step."""
    scheduler, inner = scheduler_of(live), innermost(live.trainer.optimizer)
    theirs = getattr(getattr(scheduler, "optimizer", None), "param_groups", [])
    same = len(theirs) == len(inner.param_groups) and all(
        a is b for a, b in zip(theirs, inner.param_groups, strict=True)
    )
    return Reading(
        "scheduler's optimizer",
        "the one that steps",
        "the one that steps" if same else "another one",
        same,
        f"param_groups of {type(scheduler).__name__}.optimizer against those of {type(inner).__name__}",
        "make the scheduler after the optimizer was prepared",
    )


def _steps(live: Live, asked: Asked) -> Reading:
    found = int(live.trainer.args.max_steps)
    wanted = asked.facts.total_steps
    return compared(
        "schedule.steps",
        None if wanted is None else f"{wanted} steps",
        f"{found} steps",
        "TrainingArguments.max_steps" if wanted is not None else "how long the whole run is was not given",
        "schedule.steps, or schedule.epochs times the samples left after the split",
    )


def _clip(live: Live, asked: Asked) -> Reading:
    engine = engine_of_deepspeed(live)
    found = float(engine.gradient_clipping() if engine is not None else live.trainer.args.max_grad_norm or 0.0)
    zero, wanted = zero_of(live), asked.key("schedule.clip")
    inner = float(getattr(zero, "clip_grad", found))  # what DeepSpeed's optimizer divides by
    text = f"{found:g}" if inner == found else f"{found:g}, its optimizer {inner:g}"
    return compared(
        "schedule.clip",
        None if wanted is None else f"{float(wanted):g}",
        text,
        "DeepSpeedEngine.gradient_clipping" if engine is not None else "TrainingArguments.max_grad_norm",
        "gradient_clipping of the engine's configuration must be schedule.clip, or left out",
    )


def _batches(live: Live, asked: Asked) -> Iterator[Reading]:
    trainer, engine = live.trainer, engine_of_deepspeed(live)
    micro = {"Trainer": int(trainer._train_batch_size)}
    # accelerate's own counter stays 1: transformers' Trainer counts and divides itself.
    steps = {"Trainer": int(trainer.args.gradient_accumulation_steps)}
    if engine is not None:
        micro["DeepSpeed"] = int(engine.train_micro_batch_size_per_gpu())
        steps["DeepSpeed"] = int(engine.gradient_accumulation_steps())
    for batch in live.batches[:1]:
        rows = int(batch["input_ids"].shape[0])
        if rows > micro["Trainer"]:  # fewer are right where the data has no more
            micro["the worst micro-batch"] = rows
    wanted = asked.lever("micro_batch")
    yield _all_equal("levers.micro_batch", micro, wanted, "train_micro_batch_size_per_gpu must be levers.micro_batch")
    ranks, batch = int(trainer.args.world_size), asked.key("batch")
    whole = {name: each * ranks * micro["Trainer"] for name, each in steps.items()}
    yield _all_equal("batch", whole, batch, "batch is micro-batch x accumulation x ranks: set each from the recipe")


def _all_equal(lever: str, values: dict[str, int], wanted: Any, fix: str) -> Reading:
    odd = {name: value for name, value in values.items() if wanted is not None and value != wanted}
    text = ", ".join(sorted({str(value) for value in values.values()}))
    evidence = ", ".join(f"{name} has {value}" for name, value in values.items())
    if wanted is None:
        return stated(lever, text, evidence)
    return Reading(lever, str(wanted), text, not odd, evidence, fix)


def _scaling(live: Live, asked: Asked) -> Reading:
    scaler, zero = getattr(live.trainer.accelerator, "scaler", None), zero_of(live)
    if zero is not None:
        dynamic = bool(getattr(zero, "dynamic_loss_scale", False))
        scale = float(getattr(zero, "loss_scale", 1.0))
        found = "dynamic" if dynamic else "none" if scale == 1.0 else f"fixed at {scale:g}"
        where = f"{type(zero.loss_scaler).__name__} of {type(zero).__name__}, at {scale:g}"
    else:
        found = "dynamic" if scaler is not None and scaler.is_enabled() else "none"
        where = f"accelerator.scaler is {type(scaler).__name__ if scaler is not None else None}"
    wanted = None
    if asked.plan is not None:
        wanted = "dynamic" if str(asked.plan.recipe.levers.precision).startswith("fp16") else "none"
    return compared("loss scaling", wanted, found, where, "levers.precision: bf16-amp or bf16-mixed needs no scaling")


def read_after(live: Live, asked: Asked, seen: Seen) -> Iterator[Reading]:
    """The rates in force after the watched steps, and the micro-batches that a step really took."""
    groups, plan = groups_of(live), asked.plan
    text = ", ".join(sorted({f"{float(group.values['lr']):.3e}" for group in groups}))
    if plan is None:
        yield stated("learning rate in force", text, f"lr of the groups after step {live.trainer.state.global_step}")
        return
    done = int(live.trainer.state.global_step)
    total = asked.facts.total_steps or int(live.trainer.args.max_steps)
    warmup = round(plan.recipe.schedule.warmup * total)
    # The scheduler stands still for a step that loss scaling skipped, so that any step up to now is right under fp16.
    fp16 = str(plan.recipe.levers.precision).startswith("fp16")
    steps = range(done + 1) if fp16 else (done,)
    right = any(
        all(_near(group, factor(plan.recipe.schedule.kind, s, warmup, total)) for group in groups) for s in steps
    )
    wanted = ", ".join(
        sorted({f"{base_rate(g.values) * factor(plan.recipe.schedule.kind, done, warmup, total):.3e}" for g in groups})
    )
    yield Reading(
        "learning rate in force",
        wanted,
        text,
        right,
        f"lr of the optimizer's groups after step {done} of {total}",
        "the scheduler must step once an optimizer step: look for a second scheduler in the engine's configuration",
    )


def _near(group: Group, wanted: float) -> bool:
    return math.isclose(float(group.values["lr"]), base_rate(group.values) * wanted, rel_tol=1e-6, abs_tol=1e-15)
