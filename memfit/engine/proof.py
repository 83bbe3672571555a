"""The proof: a short run through the very code that trains, on the worst batches, before the long one.

Every rank reads its live objects back (memfit.engine.readback), runs each worst batch through forward, backward, step,
evaluation and save, and measures; the first reloads what was saved and lays all beside the forecast.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import shutil
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import distributed
from torch.utils.data import Subset
from transformers import TrainerCallback, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import IntervalStrategy

from memfit.build.build import Built, build
from memfit.engine.engines import engine_of
from memfit.engine.gather import is_split
from memfit.engine.measuring.following import followed
from memfit.engine.measuring.gradients import arrival, note_gradients
from memfit.engine.measuring.live import LiveTensors, seen_now
from memfit.engine.measuring.meter import Marks, Meter, held_on_gpu
from memfit.engine.measuring.outside import Outside
from memfit.engine.measuring.read import course_json
from memfit.engine.measuring.states import names_of, walk
from memfit.engine.ranks import count, is_first, rank, wait_for_all
from memfit.engine.readback.live import Facts, live_of
from memfit.engine.readback.read import WATCHED_STEPS, ReadBack
from memfit.engine.recording import Progress
from memfit.engine.reload import Answer, answer_of, compare_reloaded
from memfit.engine.run_log import RunLog
from memfit.engine.train import Job, Steps, count_steps
from memfit.engine.train import _arguments as make_arguments
from memfit.engine.train import _refuse_small_disk as refuse_small_disk
from memfit.engine.train import _trainer as make_trainer
from memfit.engine.worst import StepSampler
from memfit.errors import MemfitError, UserError
from memfit.inputs.run_folder import RunFolder, free_bytes, read_json, write_json, write_text
from memfit.monitor.proof_join import RunFacts, joined
from memfit.monitor.proof_picture import picture
from memfit.planner.worst import Chosen, worst_batches
from memfit.specs.proof import Check, Proof, ProofKind, WorstBatch
from memfit.specs.sample import Sample

PROOF, PICTURE = "proof.json", "proof.svg"
RANK = "proof-rank-{rank}.json"
MICROS = 2  # micro-batches of a step that are run: the second finds the first one's gradients


@dataclass(frozen=True)
class Stage:
    """One optimizer step of the proof: which batch, and what is looked at. "watch": read back; "track": every live
    tensor; "plain": nothing stands beside it, so its seconds count, and a GPU's peaks."""

    batch: int
    kind: str


def stages_of(batches: int, cpu: bool) -> tuple[Stage, ...]:
    """The steps in their order. Optimizer states exist after the first; DDP makes its buckets anew in the second."""
    first = [Stage(0, "watch")] * WATCHED_STEPS
    each = [Stage(place, "track" if cpu else "plain") for place in range(batches)]
    return (*first, *each, Stage(0, "plain" if cpu else "track"))


@dataclass
class Measured:
    """What one rank saw; `proof-rank-N.json` holds it."""

    rank: int
    checks: tuple[Check, ...] = ()
    text: str = ""
    courses: list[dict[str, Any]] = field(default_factory=list)
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    step_bytes: list[int] = field(default_factory=list)
    rss_bytes: int = 0
    unique_bytes: int = 0
    checkpoint_bytes: int | None = None
    base_bytes: int = 0
    process_bytes: int | None = None
    trouble: str = ""
    hint: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def prove(job: Job, kind: ProofKind) -> Proof | None:
    """Prove a job in this process, as one of its ranks; the proof on the first rank, None on the others.

    Nothing of the run is touched: models, optimizers and loaders are the proof's own, and its files go again. The
    process group ends here. Raises UserError as `train` does; whatever else goes wrong is a failed check.
    """
    began, outside = time.monotonic(), seen_now()
    if not job.train:
        raise UserError("no training samples are left", "run memfit check on the data")
    task = _task(job, kind)
    found = Measured(rank())
    before = _tried(task, found, outside)
    _let_go()
    logs = job.folder.path / "logs"
    logs.mkdir(exist_ok=True)
    write_json(logs / RANK.format(rank=rank()), found.to_json())
    ranks, first = count(), is_first()
    wait_for_all()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    if not first:
        return None
    seen = [read_json(logs / RANK.format(rank=number)) for number in range(ranks)]
    again: tuple[Check, ...] = ()
    if before is not None and task.saved is not None:
        again = compare_reloaded(job.plan, job.materials, task.saved, before)
        _let_go()
    shutil.rmtree(task.job.folder.path, ignore_errors=True)
    proof = joined(job.plan, seen, task.facts(), again, time.monotonic() - began)
    values = proof.to_json()
    write_json(job.folder.path / PROOF, values)
    if drawn := picture(values):
        write_text(job.folder.path / PICTURE, drawn)
    return proof


@dataclass
class _Task:
    """A job and how much of it is run. `saved`: the folder that a checkpoint was written to."""

    job: Job
    kind: ProofKind
    steps: Steps
    chosen: tuple[Chosen, ...]
    stages: tuple[Stage, ...]
    micros: int
    evaluated: tuple[Sample, ...]
    saved: Path | None = None

    def facts(self) -> RunFacts:
        """What the proof's figures are laid against, and is no part of the plan."""
        job, costs = self.job, self.job.train_costs
        batches = tuple(
            WorstBatch(
                chosen.reason,
                tuple(job.train[place].id for place in chosen.places),
                sum(costs[place].tokens for place in chosen.places),
                sum(costs[place].trained_tokens for place in chosen.places),
                sum(len(job.train[place].images) for place in chosen.places),
                sum(costs[place].crops for place in chosen.places),
            )
            for chosen in self.chosen
        )
        mean = sum(cost.tokens for cost in costs) / len(costs)
        worst = max(batch.tokens for batch in batches) / self.steps.micro_batch
        return RunFacts(
            kind=self.kind,
            batches=batches,
            accumulation=self.steps.accumulation,
            micros=self.micros,
            total_steps=self.steps.total,
            mean_share=min(1.0, mean / worst) if worst else 1.0,
            free_disk=free_bytes(job.folder.path),
        )


def _task(job: Job, kind: ProofKind) -> _Task:
    recipe, hardware = job.plan.recipe, job.plan.forecast.hardware
    micro, packing = int(recipe.levers.micro_batch), bool(recipe.levers.packing)
    chosen = job.worst or worst_batches(job.train_costs, micro, packing)
    stages = stages_of(len(chosen), hardware.gpu is None)
    steps = count_steps(recipe, len(job.train), hardware.ranks)
    micros = min(MICROS, steps.accumulation)
    order = StepSampler([chosen[stage.batch].places for stage in stages], micros, hardware.ranks)
    heaviest = worst_batches(job.eval_costs, micro, packing)[0].places if job.eval_costs else ()
    evaluated = tuple(job.evaluate[place] for place in heaviest) * hardware.ranks
    short = dataclasses.replace(job, folder=RunFolder(job.folder.path / "proof"), order=order)
    return _Task(short, kind, steps, chosen, stages, micros, evaluated)


def _tried(task: _Task, found: Measured, outside: Outside) -> Answer | None:
    """Run a task; what goes wrong on purpose is written down in `found`."""
    try:
        return _run(task, found, outside)
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        found.trouble = f"out of memory: {str(error).splitlines()[0]}"
        found.hint = "levers.checkpointing: full, a smaller image budget, or method: lora"
    except MemfitError as error:
        found.trouble, found.hint = getattr(error, "problem", str(error)), getattr(error, "hint", "")
    return None


def _let_go() -> None:
    """Free what the last model left behind, and what transformers remembers of its engine."""
    unset_hf_deepspeed_config()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _run(task: _Task, found: Measured, outside: Outside) -> Answer | None:
    """The steps of a task on this rank."""
    job = task.job
    set_seed(job.plan.recipe.seed)
    engine = engine_of(job.plan)
    # A run of fewer steps than the proof takes is laid out for as many: its schedule's shape is that of the recipe.
    steps = dataclasses.replace(task.steps, total=max(task.steps.total, len(task.stages)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream's deprecations are not the user's
        arguments = make_arguments(job, steps, engine)
    arguments.report_to = []
    built = build(job.plan, job.materials)
    split = is_split(built.model)
    if is_first() and task.kind == "full":
        refuse_small_disk(job, built)
    job.folder.path.mkdir(exist_ok=True)
    name = "steps.jsonl" if is_first() else f"steps-{rank()}.jsonl"
    trainer, recorder = make_trainer(job, built, arguments, engine, RunLog(job.folder.path / name))
    recorder.progress = _Silent()
    facts = Facts(steps.total, len(job.train), len(job.evaluate), engine.notes)
    batches = [built.collator([trainer.train_dataset[at] for at in chosen.places]) for chosen in task.chosen]
    make = functools.partial(live_of, trainer, built, batches, split_at_load=split)
    reader = ReadBack(make, job.plan, facts)
    proving = Proving(trainer, built, task, found, (outside, batches))
    trainer.add_callback(reader)
    trainer.add_callback(proving)
    try:
        trainer.train()
    finally:
        reader.close()
        found.checks, found.text = reader.checks, reader.text
        proving.close()
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.destroy()  # its hooks also hang on activations that transformers shares between models
    return proving.answer


class _Silent(Progress):
    """The steps of a proof are no news: its card is."""

    def say(self, text: str) -> None:
        return None


class Proving(TrainerCallback):
    """Looks at each step as its stage says, evaluates and saves behind the last, and fills `found`.

    `apart`: the storages that were there before, and the worst batches that the proof itself holds: neither counts.
    """

    def __init__(
        self, trainer: Any, built: Built, task: _Task, found: Measured, apart: tuple[Outside, list[dict[str, Any]]]
    ) -> None:
        self._trainer, self._built, self._task, self._found = trainer, built, task, found
        self._outside, self._batches = apart
        self._meter = Meter(torch.device(trainer.args.device))
        self._marks: Marks | None = None
        self._tracker: LiveTensors | None = None
        self._handles: list[Any] = []
        self._began = 0.0
        self._batch: tuple[Any, ...] = ()
        self._process = psutil.Process()
        self.answer: Answer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.eval_strategy = args.save_strategy = IntervalStrategy.NO  # once, behind the last step
        task = self._task
        if task.evaluated and self._trainer.eval_dataset is not None:
            whole = self._trainer.eval_dataset
            places = [task.job.evaluate.index(sample) for sample in task.evaluated]
            self._trainer.eval_dataset = Subset(whole, places)
        self._marks = Marks(self._trainer, self._meter, self._inputs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage = self._task.stages[state.global_step]
        self._meter.measured = stage.kind == "plain"
        self._meter.timed = stage.kind == "plain"
        if stage.kind == "track":
            self._track()
        self._meter.wait()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage = self._task.stages[state.global_step - 1]
        self._meter.enter("")
        self._meter.wait()
        if stage.kind == "plain" and stage.batch == 0:
            self._found.seconds["whole"] = [time.perf_counter() - self._began]
        self._found.rss_bytes = max(self._found.rss_bytes, self._process.memory_info().rss)
        if self._tracker is not None:
            self._found.courses.append({"batch": stage.batch} | self._tracked())
        self._meter.timed = False
        control.should_evaluate = control.should_save = False
        if state.global_step < len(self._task.stages):
            return
        control.should_training_stop = True
        control.should_evaluate = bool(self._task.evaluated) and self._trainer.eval_dataset is not None
        control.should_save = self._task.kind == "full"
        self._meter.measured = True
        if control.should_evaluate:
            if self._meter.device.type == "cpu":
                self._track()
            self._meter.enter("evaluate")
        elif control.should_save:
            self._meter.enter("save")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.enter("")
        if self._tracker is not None:
            self._found.courses.append({"batch": 0} | self._tracked())
        if control.should_save:
            self._meter.enter("save")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.enter("")
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._found.checkpoint_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        self._task.saved = folder

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        meter, found = self._meter, self._found
        found.seconds |= meter.seconds
        found.peaks = {phase: dataclasses.asdict(peak) for phase, peak in meter.peaks.items() if phase}
        found.unique_bytes = self._process.memory_full_info().uss
        found.process_bytes = held_on_gpu() if meter.device.type == "cuda" else None
        self.close()
        if self._task.saved is None:
            return
        trainer, built = self._trainer, self._built
        batch = trainer._prepare_inputs(self._batches[0])
        with trainer.compute_loss_context_manager():
            self.answer = answer_of(trainer.model, built, trainer.model_wrapped, batch, self._task.job.folder.path)

    def close(self) -> None:
        """Take every hook away."""
        if self._tracker is not None:
            self._tracked()
        if self._marks is not None:
            self._marks.remove()
            self._marks = None

    def _track(self) -> None:
        """Begin to follow every live tensor."""
        trainer, model = self._trainer, self._trainer.model
        tracker = followed(trainer, self._built.part_of, self._outside, self._batches)
        tracker.label(names_of(trainer, model))
        tracker.begin()
        part_of = self._built.part_of
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(arrival(tracker, part_of(name))))
        self._meter.before_step = functools.partial(note_gradients, tracker, trainer, model, part_of)
        self._tracker = self._meter.tracker = tracker
        tracker.__enter__()

    def _tracked(self) -> dict[str, Any]:
        """Stop following, and say what was seen."""
        tracker, self._tracker, self._meter.tracker = self._tracker, None, None
        self._meter.before_step = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if tracker is None:
            return {}
        tracker.__exit__(None, None, None)
        return course_json(tracker)

    def _inputs(self, given: Any, first: bool) -> None:
        """What is given to the model (`first`) and to the loss is the batch; the batch before it waits to go."""
        if self._tracker is None:
            return
        if first:
            self._tracker.rename_all("batch", "waiting")
        self._tracker.rename(walk(given), "batch")
