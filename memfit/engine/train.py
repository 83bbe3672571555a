"""Train: plan to live objects through `build`, transformers' Trainer, and a run folder that loses nothing."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainingArguments, set_seed

from memfit.build.build import Built, Materials, build
from memfit.build.data import SampleDataset
from memfit.build.freeze import whole_numel
from memfit.catalog.optimizers import OPTIMIZERS, rounds_by_chance
from memfit.engine.again import ReadAgain
from memfit.engine.engines import Engine, engine_of
from memfit.engine.gather import is_split
from memfit.engine.learned import learning_facts
from memfit.engine.ranks import PATIENCE, count, is_first, rank
from memfit.engine.readback.live import Facts, live_of
from memfit.engine.recording import Recorder
from memfit.engine.run_log import RunLog
from memfit.engine.sampling import FilledDataset
from memfit.engine.save import (
    drop_half_checkpoints,
    free_name,
    looks_like_full_disk,
    save_or_rescue,
    save_weights,
    saved_state,
)
from memfit.engine.stall import STALLED, Patience
from memfit.engine.stochastic import lost_steps
from memfit.engine.trainer import Hooks, MemfitTrainer, PartRates
from memfit.errors import MemfitError, RunFailed, UserError
from memfit.inputs.cache import cache_folder
from memfit.inputs.data.images import open_image
from memfit.inputs.run_folder import RunFolder, free_bytes, write_json
from memfit.planner.worst import Chosen
from memfit.specs.plan import Plan
from memfit.specs.recipe import Recipe
from memfit.specs.sample import Sample
from memfit.specs.workload import SampleCost
from memfit.units import gib

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
PILOT_SHARE = 0.02  # of the steps of the whole run
PILOT_STEPS = (10, 200)  # at least and at most


@dataclass(frozen=True)
class Job:
    """What one training run takes: the plan, the data, where to write.

    `most_pixels`: those of the largest picture that the plan's host memory counts with; None for no check. The costs
    are those of `train` and `evaluate`, sample by sample. `worst`: the micro-batches that a proof runs, first the one
    that the plan forecasts. `order`: how samples are drawn, None for the recipe's seed.
    """

    plan: Plan
    materials: Materials
    train: Sequence[Sample]
    evaluate: Sequence[Sample]
    folder: RunFolder
    pilot: bool = False
    most_pixels: int | None = None
    train_costs: tuple[SampleCost, ...] = ()
    eval_costs: tuple[SampleCost, ...] = ()
    worst: tuple[Chosen, ...] = ()
    order: Sampler[int] | None = None


@dataclass(frozen=True)
class Trained:
    """What came of it. `projected_seconds` is the whole run's time, from a pilot's median step."""

    folder: Path
    model: Path
    steps: int
    total_steps: int
    seconds: float
    loss: float | None
    projected_seconds: float | None


@dataclass(frozen=True)
class Steps:
    """How the schedule falls out in numbers."""

    micro_batch: int
    accumulation: int
    total: int
    an_epoch: int


def count_steps(recipe: Recipe, samples: int, ranks: int) -> Steps:
    """Optimizer steps of an effective recipe over `samples` samples; the last batch of an epoch may be smaller."""
    micro, batch = recipe.levers.micro_batch, recipe.batch
    if not isinstance(micro, int) or not isinstance(batch, int):
        raise TypeError("count_steps needs an effective recipe: micro_batch and batch as numbers")
    accumulation = batch // (micro * ranks)
    loads = -(-samples // (micro * ranks))
    an_epoch = max(1, -(-loads // accumulation))
    total = recipe.schedule.steps or max(1, round(recipe.schedule.epochs * an_epoch))
    return Steps(micro, accumulation, total, an_epoch)


def train(job: Job) -> Trained:
    """Run the plan. Raises UserError before anything is written, RunFailed (exit 5) after; saved work stays.

    A pilot runs the first few steps of the whole run's own schedule and saves nothing but its log.
    """
    recipe = job.plan.recipe
    if not job.train:
        raise UserError("no training samples are left", "run memfit check on the data")
    set_seed(recipe.seed)
    steps = count_steps(recipe, len(job.train), job.plan.forecast.hardware.ranks)
    engine = engine_of(job.plan)
    # Before the model: under ZeRO-3 transformers splits it while it loads, by the configuration that these hold.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream's deprecations are not the user's
        arguments = _arguments(job, steps, engine)
    built = build(job.plan, job.materials)
    engine = dataclasses.replace(engine, notes=(*engine.notes, *lost_steps(job.plan.recipe, built.model)))
    split = is_split(built.model)
    log = RunLog(job.folder.log if is_first() else job.folder.path / "logs" / f"rank-{rank()}.jsonl")
    if is_first():
        _refuse_small_disk(job, built)
        write_json(job.folder.path / "engine.json", {"name": engine.name, "config": dict(engine.config)})
    trainer, recorder = _trainer(job, built, arguments, engine, log)
    facts = Facts(steps.total, len(job.train), len(job.evaluate), engine.notes)
    trainer.add_callback(ReadAgain(functools.partial(live_of, trainer, built, split_at_load=split), job.plan, facts))
    learned = learning_facts(job.plan, built, trainer.get_decay_parameter_names(built.model), arguments)
    said = _start_facts(job, built, steps) | {"learning": learned}
    log.write("start", **said, engine=engine.name, ranks=count(), notes=list(engine.notes))
    try:
        outcome = trainer.train()
    except KeyboardInterrupt:
        if count() == 1:  # several ranks are stopped at several places: what they hold is no one step's
            _keep(job, built, log, "interrupted")
        raise
    except Exception as error:
        raise _explained(error, job, built, log) from error
    seconds = outcome.metrics["train_runtime"]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    done = trainer.state.global_step
    median = statistics.median(recorder.step_seconds[1:] or recorder.step_seconds)
    where = job.folder.model
    if not job.pilot:
        where = _keep(job, built, log, "model")
    log.write("end", step=done, seconds=round(seconds, 2), median_step_seconds=round(median, 4), model=str(where))
    return Trained(
        folder=job.folder.path,
        model=where,
        steps=done,
        total_steps=steps.total,
        seconds=seconds,
        loss=losses[-1] if losses else None,
        projected_seconds=median * steps.total if job.pilot else None,
    )


def learning_rates(recipe: Recipe, learning_parts: Sequence[str]) -> Mapping[str, float]:
    """The rate of every part that learns. Raises UserError for a part that the recipe's mapping leaves out."""
    rate = recipe.schedule.learning_rate
    if not isinstance(rate, Mapping):
        return dict.fromkeys(learning_parts, float(rate))
    left_out = [part for part in learning_parts if part not in rate]
    if left_out:
        raise UserError(
            f"schedule.learning_rate names no rate for {', '.join(left_out)}, which learns",
            f"add schedule.learning_rate.{left_out[0]}, or set parts.{left_out[0]}: frozen",
        )
    return {part: float(rate[part]) for part in learning_parts}  # type: ignore[index]


def _trainer(
    job: Job, built: Built, arguments: TrainingArguments, engine: Engine, log: RunLog
) -> tuple[MemfitTrainer, Recorder]:
    recipe, total = job.plan.recipe, arguments.max_steps
    together = not isinstance(recipe.schedule.learning_rate, Mapping)
    rates = PartRates(learning_rates(recipe, sorted(built.trainable)), built.part_of, together)
    seed = recipe.seed if rounds_by_chance(recipe.levers.optimizer, str(recipe.levers.precision)) else None
    if engine.config.get("zero_force_ds_cpu_optimizer"):
        seed = None  # DeepSpeed's own steps on the host
    save = functools.partial(save_weights, source=built.source_folder)
    hooks = Hooks(rates, save, engine, rounding_seed=seed, order=job.order)
    pilot_steps = max(PILOT_STEPS[0], min(PILOT_STEPS[1], int(total * PILOT_SHARE)))
    recorder = Recorder(log, hooks.counts, min(pilot_steps, total) if job.pilot else None)
    read = functools.partial(open_image, most_pixels=job.most_pixels) if job.most_pixels else open_image
    samples = SampleDataset(job.train, built.encoder, built.pixels, read=read)
    evaluate = SampleDataset(job.evaluate, built.encoder, built.pixels, read=read) if _evaluates(job) else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream's deprecations are not the user's
        trainer = MemfitTrainer(
            model=built.model,
            args=arguments,
            data_collator=built.collator,
            train_dataset=FilledDataset(samples) if count() > 1 else samples,
            eval_dataset=evaluate,
            callbacks=[recorder],
            compute_loss_func=built.loss,
            hooks=hooks,
        )
    if count() > 1:
        trainer.add_callback(Patience(job.folder.path / "logs" / STALLED.format(rank=rank()), PATIENCE.total_seconds()))
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer, recorder


def _evaluates(job: Job) -> bool:
    return bool(job.evaluate) and not job.pilot


def _arguments(job: Job, steps: Steps, engine: Engine) -> TrainingArguments:
    """Every value that matters said outright: upstream's defaults move between versions."""
    recipe, hardware = job.plan.recipe, job.plan.forecast.hardware
    schedule, levers = recipe.schedule, recipe.levers
    cpu = hardware.gpu is None
    every = recipe.run.eval_every if isinstance(recipe.run.eval_every, int) else steps.an_epoch
    save_every = recipe.run.save_every if isinstance(recipe.run.save_every, int) else steps.an_epoch
    workers = recipe.loader.workers if isinstance(recipe.loader.workers, int) else 0
    return TrainingArguments(
        output_dir=str(job.folder.checkpoints),
        per_device_train_batch_size=steps.micro_batch,
        per_device_eval_batch_size=steps.micro_batch,
        gradient_accumulation_steps=steps.accumulation,
        max_steps=steps.total,
        learning_rate=1.0,  # every group brings its own
        lr_scheduler_type=SCHEDULES[schedule.kind],
        warmup_steps=round(schedule.warmup * steps.total),
        weight_decay=schedule.weight_decay,
        adam_beta1=schedule.betas[0],
        adam_beta2=schedule.betas[1],
        max_grad_norm=schedule.clip,
        optim=OPTIMIZERS[levers.optimizer].engine_name,
        average_tokens_across_devices=True,
        gradient_checkpointing=False,  # build sets it layer by layer
        use_cpu=cpu,
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if _evaluates(job) else "no",
        eval_steps=every,
        prediction_loss_only=True,
        save_strategy="no" if job.pilot else "steps",
        save_steps=save_every,
        save_total_limit=recipe.run.keep,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=recipe.loader.prefetch if workers else None,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=recipe.loader.pin is True or (recipe.loader.pin == "auto" and not cpu),
        remove_unused_columns=False,
        report_to=list(recipe.run.report_to) or "none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        ddp_backend="gloo" if cpu and engine.name != "none" else None,
        **engine.arguments(job.plan),
    )


def _keep(job: Job, built: Built, log: RunLog, name: str) -> Path:
    """Save the live weights as RUN/NAME, or in the cache folder when the run's disk is full."""
    state = saved_state(built.model, built.saved_dtype, job.folder.path) if is_split(built.model) else None
    if not is_first():
        return job.folder.path / name
    rescue = free_name(cache_folder() / "rescued" / f"{job.folder.path.name}-{name}")
    where, problem = save_or_rescue(
        lambda folder: save_weights(built.model, folder, built.source_folder, built.saved_dtype, state),
        job.folder.path / name,
        rescue,
    )
    log.write("save", step=None, folder=str(where))
    if problem is not None:
        raise RunFailed(
            f"the disk of {job.folder.path} is full ({gib(free_bytes(job.folder.path))} free): the trained weights "
            f"were saved to {where} instead",
            f"make room, then move {where} to {job.folder.path / name}",
        )
    if name == "interrupted":
        print(f"memfit: stopped; the weights so far are in {where}", file=sys.stderr)
    return where


def _refuse_small_disk(job: Job, built: Built) -> None:
    """Ask for the room of the final model and the checkpoints before hours are spent."""
    if job.pilot:
        return
    learning = sum(whole_numel(p) * p.element_size() for p in built.model.parameters() if p.requires_grad)
    whole = sum(whole_numel(p) * p.element_size() for p in built.model.parameters())
    weights = learning if built.adapted else whole
    terms = job.plan.forecast.ledger.terms
    optimizer = sum(term.bytes for term in terms if term.id.split(".")[0] in {"optimizer", "master"})
    optimizer *= job.plan.layout.split_optimizer  # the terms are one rank's
    # The newest checkpoint is written before the oldest is removed.
    needed = int(weights + (job.plan.recipe.run.keep + 1) * (weights + optimizer))
    free = free_bytes(job.folder.path)
    if free < needed:
        raise UserError(
            f"saving needs {gib(needed)} ({job.plan.recipe.run.keep} checkpoints, one being written, and the model), "
            f"{job.folder.path} has {gib(free)} free",
            "set run.folder to another disk, or run.keep lower",
        )


def _explained(error: Exception, job: Job, built: Built, log: RunLog) -> Exception:
    """The error a user can act on; anything unknown keeps its own traceback."""
    log.write("failed", error=f"{type(error).__name__}: {error}"[:2000])
    if isinstance(error, MemfitError):
        return error
    if "Caught UserError in DataLoader worker" in str(error):  # a worker's error comes as text, with its traceback
        problem, _, hint = str(error).rpartition("UserError: ")[2].partition("\n\nhint: ")
        return UserError(problem, hint)
    if looks_like_full_disk(error, job.folder.path):
        drop_half_checkpoints(job.folder.checkpoints)
        try:
            _keep(job, built, log, "model-at-full-disk")
        except RunFailed as told:
            return told
        return RunFailed(
            f"the disk of {job.folder.path} is full: a checkpoint could not be written",
            f"the weights so far are in {job.folder.path / 'model-at-full-disk'}; make room or set run.keep lower",
        )
    if isinstance(error, torch.OutOfMemoryError):
        free, whole = torch.cuda.mem_get_info()
        return RunFailed(
            f"out of GPU memory: {gib(torch.cuda.max_memory_allocated())} were allocated, "
            f"{gib(free)} of {gib(whole)} free now; {str(error).splitlines()[0]}",
            "set levers.checkpointing=full, a smaller image budget, or method=lora",
        )
    return error


def _start_facts(job: Job, built: Built, steps: Steps) -> dict[str, Any]:
    import peft
    import transformers

    return {
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "hardware": job.plan.forecast.hardware.text,
        "threads": torch.get_num_threads(),
        "samples": len(job.train),
        "eval_samples": len(job.evaluate),
        "total_steps": steps.total,
        "accumulation": steps.accumulation,
        "trainable": dict(built.trainable),
        "checkpointed": dict(built.checkpointed),
        "pilot": job.pilot,
        "seed": job.plan.recipe.seed,
        "working_folder": str(Path.cwd()),  # what relative paths of the recipe are of
    }
