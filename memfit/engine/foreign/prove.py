"""`memfit.prove(trainer)`: the worst batch of a user's own trainer run for a few steps, read back, measured, undone.

A clone of the trainer, of its own class and over the same model, runs; then all that it touched is put back, so that
the training that follows equals one without a proof, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from memfit.engine.foreign import asked
from memfit.engine.foreign.clone import arguments_of, clone_of, silent_callbacks, total_steps
from memfit.engine.foreign.described import describe, finder, hardware_of, known_family
from memfit.engine.foreign.forecast import forecast_of
from memfit.engine.foreign.judged import judged
from memfit.engine.foreign.kept import Kept
from memfit.engine.foreign.show import foreign_card
from memfit.engine.foreign.steps import Looking, outside_of
from memfit.engine.foreign.worst import Found, Progress, tokens_of, trained_of, worst_of
from memfit.engine.gather import is_split
from memfit.engine.proof import MICROS, Measured, Stage, stages_of
from memfit.engine.ranks import count, is_first, rank, wait_for_all
from memfit.engine.readback.live import Live
from memfit.engine.readback.read import WATCHED_STEPS, ReadBack
from memfit.engine.readback.reading import across_ranks, tried
from memfit.engine.worst import StepSampler
from memfit.errors import ProofFailed, UserError
from memfit.inputs.run_folder import free_bytes, write_json
from memfit.monitor.proof_join import RunFacts, joined
from memfit.monitor.proof_tables import failed_line
from memfit.monitor.waiting import Counter
from memfit.specs.plan import Plan
from memfit.specs.proof import Check, Proof, WorstBatch
from memfit.units import gib

NOT_RUN = (
    "no step was run: FSDP splits the model for good, which cannot be undone; memfit train proves FSDP2 in processes "
    "of its own"
)


@dataclass(frozen=True)
class Options:
    """`folder` gets proof.json, `say` hears the card; with `strict` a failed proof raises ProofFailed."""

    folder: Path | None = None
    strict: bool = False
    say: Callable[[str], None] = print


def prove_trainer(trainer: Any, options: Options) -> Proof:
    """The proof of a trainer that has not trained yet. Every rank must call it, and all get the same.

    Arguments, adapters and engine are read back from live objects, the longest samples are run for a few steps and
    measured; weights, optimizer, chance and settings are put back bit for bit. A finding is no error: `Proof.failed`
    names it. UserError where nothing can be proved at all: the trainer has trained already, or has no data.
    """
    counter = Counter(functools.partial(print, file=sys.stderr))
    proof = _proof(trainer, counter if is_first() else lambda what, done, total: None)
    if is_first():
        options.say(foreign_card(proof))
        if options.folder is not None:
            write_json(Path(options.folder) / "proof.json", proof.to_json())
    failed = failed_line(proof.to_json())
    if options.strict and failed is not None:
        raise ProofFailed(*failed)
    return proof


def _proof(trainer: Any, progress: Progress) -> Proof:
    _refuse(trainer)
    began = time.monotonic()
    kept = Kept(trainer)
    measured = Measured(rank())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # upstream's deprecations are told again when the user trains
            run = _prepared(trainer, progress)
            if not trainer.is_fsdp_enabled:
                _steps(trainer, run, measured, progress)
    finally:
        _let_go(trainer)
        kept.restore()
    seen = _gathered(measured)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        proof = _joined(trainer, run, seen, began) if is_first() else None
    kept.restore()  # a trace may draw chance
    notes = _notes(trainer, run, kept)
    return _to_all(None if proof is None else dataclasses.replace(proof, notes=(*proof.notes, *notes)))


@dataclass(frozen=True)
class _Run:
    """What is run of a trainer: its worst batches, how long its own run is, and the steps that are taken."""

    found: Found
    total: int
    stages: tuple[Stage, ...]
    micros: int
    split_at_load: bool
    samples: int | None


def _refuse(trainer: Any) -> None:
    if trainer.state.global_step or trainer.is_in_train:
        raise UserError(
            f"this trainer has trained {trainer.state.global_step} steps already",
            "call memfit.prove(trainer) before trainer.train()",
        )
    if trainer.train_dataset is None:
        raise UserError("this trainer has no train_dataset", "give it one: its longest samples decide the peak")
    if trainer.model is None:
        raise UserError("this trainer has no model yet", "give it a model")


def _prepared(trainer: Any, progress: Progress) -> _Run:
    found = worst_of(trainer, trainer.train_dataset, progress)
    try:
        total = total_steps(trainer)
    except ValueError as error:
        raise UserError(
            f"how long the run is cannot be told: {error}", "set TrainingArguments(max_steps=...)"
        ) from None
    stages = stages_of(len(found.chosen), trainer.args.device.type == "cpu")
    micros = min(MICROS, int(trainer.args.gradient_accumulation_steps))
    samples = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None
    return _Run(found, total, stages, micros, is_split(trainer.model), samples)


def _steps(trainer: Any, run: _Run, measured: Measured, progress: Progress) -> None:
    """Run the steps on a clone. What goes wrong on the way is a finding, written into `measured`."""
    batches = [run.found.chosen[stage.batch].places for stage in run.stages]
    order = StepSampler(batches, run.micros, max(1, int(trainer.args.world_size)))
    gc.collect()
    outside = outside_of(trainer)
    with tempfile.TemporaryDirectory(prefix="memfit-prove-") as folder:
        args = arguments_of(trainer, Path(folder), max(run.total, len(run.stages)))
        clone = clone_of(trainer, run.found.samples, order, args)
        make = functools.partial(live_of, clone, run)
        reader = ReadBack(make, None)
        asking = _Asking(make, reader)
        part_of = finder(trainer.model, known_family(trainer.model))
        looking = Looking(clone, part_of, run.stages, measured, (outside, run.found.batches))
        for callback in (reader, asking, looking):
            clone.callback_handler.add_callback(callback)
        progress("running the worst batch", 0, len(run.stages))
        try:
            clone.train()
        except torch.OutOfMemoryError as error:
            measured.trouble = f"out of memory: {str(error).splitlines()[0]}"
            measured.hint = "gradient_checkpointing=True, a smaller per_device_train_batch_size, or shorter samples"
        except Exception as error:  # their own code, on their own worst batch: that is what was to be found
            measured.trouble, measured.hint = _told(error), "the same would have stopped trainer.train()"
        finally:
            looking.close()
            reader.close()
            measured.checks, measured.text = (*asking.checks, *judged(reader.checks, trainer)), reader.text
            if clone.is_deepspeed_enabled and hasattr(clone.model_wrapped, "destroy"):
                clone.model_wrapped.destroy()
        progress("running the worst batch", len(run.stages), len(run.stages))


def _told(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first} ({'/'.join(last.filename.split('/')[-2:])}:{last.lineno})"[:400]


class _Asking(TrainerCallback):
    """Reads back what the arguments asked for, beside `ReadBack` and from the same watched steps."""

    def __init__(self, make: Callable[[], Live], reader: ReadBack) -> None:
        self._make, self._reader = make, reader
        self._live: Live | None = None
        self._done = False
        self.checks: tuple[Check, ...] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        live = self._live = self._make()
        self.checks = across_ranks(tried([("arguments", lambda: asked.before(live))]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        live, seen = self._live, self._reader.seen
        if self._done or live is None or seen is None or seen.steps < WATCHED_STEPS:
            return
        self._done = True
        self.checks += across_ranks(tried([("arguments in steps", lambda: asked.after(live, seen))]))


def live_of(trainer: Any, run: _Run) -> Live:
    """The live objects of a trainer that memfit did not build."""
    family = known_family(trainer.model)
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    decode = getattr(tokenizer, "decode", None)
    token = getattr(getattr(trainer.model, "config", None), "image_token_id", None)
    return Live(
        trainer=trainer,
        model=trainer.model,
        part_of=finder(trainer.model, family),
        batches=tuple(run.found.batches),
        decode=decode,
        image_token_id=token if isinstance(token, int) else None,
        family=family,
        split_at_load=run.split_at_load,
        train_samples=run.samples,
    )


def _let_go(trainer: Any) -> None:
    """Free the clone's engine, optimizer and wrappers, whose hooks hang on the user's parameters."""
    trainer.accelerator.free_memory()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _gathered(measured: Measured) -> list[dict[str, Any]]:
    """What every rank measured, in their order. Every rank must call it."""
    own = measured.to_json()
    if count() == 1:
        return [own]
    told: list[dict[str, Any] | None] = [None] * count()
    distributed.all_gather_object(told, own)
    return [each or own for each in told]


def _joined(trainer: Any, run: _Run, seen: list[dict[str, Any]], began: float) -> Proof:
    """What was measured beside what is forecast from the trainer as it was and is again."""
    live, hardware = live_of(trainer, run), hardware_of(trainer)
    plan: Plan = forecast_of(live, describe(live, hardware), hardware)
    facts = RunFacts(
        kind="quick",
        batches=tuple(
            WorstBatch(
                chosen.reason,
                tuple(run.found.names[place] for place in chosen.places),
                tokens_of(batch),
                trained_of(batch) or 0,
                int(batch["pixel_values"].shape[0]) if batch.get("pixel_values") is not None else 0,
                0,
            )
            for chosen, batch in zip(run.found.chosen, run.found.batches, strict=True)
        ),
        accumulation=int(trainer.args.gradient_accumulation_steps),
        micros=run.micros,
        total_steps=run.total,
        mean_share=run.found.mean_share,
        free_disk=free_bytes(Path(trainer.args.output_dir or ".")),
    )
    proof = joined(plan, seen, facts, (), time.monotonic() - began)
    if not plan.forecast.ledger.missing or plan.forecast.interval is not None:
        return proof
    return dataclasses.replace(
        proof, peak_forecast_bytes=None, high_bytes=None, notes=(*proof.notes, *plan.forecast.ledger.missing)
    )


def _notes(trainer: Any, run: _Run, kept: Kept) -> list[str]:
    notes = [run.found.note] if run.found.note else []
    if trainer.is_fsdp_enabled:
        notes.append(NOT_RUN)
    silent = silent_callbacks(trainer)
    if silent:
        notes.append(f"callbacks of the script were not run in the proof: {', '.join(silent)}")
    notes.append(
        f"{gib(kept.bytes)} of the model were kept in host memory and put back; nothing was evaluated or saved"
    )
    return notes


def _to_all(proof: Proof | None) -> Proof:
    """The first rank's proof on every rank."""
    told: list[Proof | None] = [proof]
    if count() > 1:
        distributed.broadcast_object_list(told, src=0)
    wait_for_all()
    found = told[0]
    assert found is not None
    return found
