"""Plants the failures of `tests.plants` in a job, and runs the proof on it: what it said, and what the job really did.

Every failure is planted where users meet it: TrainingArguments, the engine's configuration, live objects, the
environment, a call of a library. Neither the plan nor the readers are touched.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerCallback

from memfit.build.build import Built
from memfit.engine import proof
from memfit.engine.proof import Stage
from memfit.engine.train import Job, count_steps
from memfit.specs.proof import Proof
from tests.faults import models, runs
from tests.faults.tables import ARGUMENTS, AROUND, BUILT, ENGINE, TRAINER, swapped

FAULTS = (models, runs)  # importing them fills the tables
WATCHED = (Stage(0, "watch"), Stage(0, "watch"))
TRACKED = (*WATCHED, Stage(0, "track"))


@dataclass
class Ran:
    """What a job really did. Bytes are the largest of each phase, where they were followed; `weights` the learned
    tensors at the end, `learning` the names of those that learn, `saved` those of the checkpoint with a fingerprint.
    `gathered_bytes`: what evaluation handed to a metric."""

    proof: Proof | None = None
    rows: int = 0
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    learning: dict[str, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    saved: dict[str, float] = field(default_factory=dict)
    host_bytes: int = 0
    gathered_bytes: int = 0
    phases: dict[str, int] = field(default_factory=dict)


def run(job: Job, plant: str | None, follow: bool = False, save: bool = False, other: Job | None = None) -> Ran:
    """Prove a job with a failure planted in it (None: healthy). `follow`: count its bytes; `save`: a checkpoint too.

    `other`: what is built, trained and measured is this job's, and the plan the first one's.
    """
    found, stages = Ran(), TRACKED if follow else WATCHED
    with planted(plant, job), instead(other), noted(found), steps_of(stages):
        found.proof = proof.prove(job, "full" if save else "quick")
    for row in found.proof.compared if found.proof else ():
        if row.name not in ("process", "checkpoint", "allocator"):
            found.phases[row.phase] = found.phases.get(row.phase, 0) + (row.measured_bytes if row.rank == 0 else 0)
    return found


def failed(found: Ran) -> dict[str, str]:
    """The levers of the checks that failed, each with what was found and its evidence."""
    if found.proof is None:
        return {}
    return {c.lever: f"asked {c.asked}, found {c.found} ({c.evidence})" for c in reversed(found.proof.failed)}


def damage(shown: str, right: Ran, wrong: Ran) -> str:
    """What a planted failure did, beside the healthy run; "" where nothing shows."""
    if shown == "bytes":
        more = {p: wrong.phases.get(p, 0) - size for p, size in right.phases.items()}
        phase = max(more, key=lambda name: abs(more[name]), default="")
        return f"{more[phase]:+,} B in {phase} of {right.phases[phase]:,}" if phase and abs(more[phase]) > 1024 else ""
    if shown == "rows":
        return f"{wrong.rows} of {right.rows} samples" if wrong.rows != right.rows else ""
    if shown == "tokens":
        return f"{wrong.tokens[0]} of {right.tokens[0]} tokens a step" if wrong.tokens[0] != right.tokens[0] else ""
    if shown == "learning":
        gone, come = right.learning.keys() - wrong.learning.keys(), wrong.learning.keys() - right.learning.keys()
        sizes = sum(wrong.learning.values()) - sum(right.learning.values())
        return f"{len(gone)} tensors fewer, {len(come)} more, {sizes:+,} elements" if gone or come or sizes else ""
    if shown == "saved":
        gone = [name for name, value in right.saved.items() if wrong.saved.get(name) != value]
        return f"{len(gone)} of {len(right.saved)} tensors missing or otherwise, {gone[0]}" if gone else ""
    if shown == "gathered":
        return f"{wrong.gathered_bytes:,} B of one micro-batch" if wrong.gathered_bytes > right.gathered_bytes else ""
    if shown == "host bytes":
        return f"{wrong.host_bytes:,} B instead of {right.host_bytes:,}" if wrong.host_bytes > right.host_bytes else ""
    apart = {n: abs(v - wrong.weights.get(n, 0.0)) / (abs(v) + 1e-9) for n, v in right.weights.items()}
    first = max(apart, key=lambda name: apart[name], default="")
    return f"{first} {apart[first]:.1e} apart" if first and apart[first] > 1e-5 else ""


# ---- what is written down -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def steps_of(stages: tuple[Stage, ...]) -> Iterator[None]:
    """A proof of these steps."""
    with swapped(proof, "stages_of", lambda batches, cpu: stages):
        yield


@contextlib.contextmanager
def noted(found: Ran) -> Iterator[None]:
    """Write down what a job does, beside the proof."""
    make, build = proof.make_trainer, proof.build

    def make_noted(*args: Any) -> Any:
        trainer, recorder = make(*args)
        trainer.add_callback(_Note(trainer, found))
        return trainer, recorder

    def build_noted(*args: Any, **named: Any) -> Built:
        built = build(*args, **named)
        found.host_bytes = sum(p.numel() * p.element_size() for p in built.model.parameters())
        return built

    with swapped(proof, "make_trainer", make_noted), swapped(proof, "build", build_noted):
        yield


class _Note(TrainerCallback):
    def __init__(self, trainer: Any, found: Ran) -> None:
        self._trainer, self._found = trainer, found

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._found.rows = len(self._trainer.train_dataset)
        self._found.learning = {
            name: int(getattr(p, "ds_numel", p.numel()))
            for name, p in kwargs["model"].named_parameters()
            if p.requires_grad
        }

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.hooks.counts.tokens = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._found.tokens.append(self._trainer.hooks.counts.tokens)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self._found.losses.append(float(logs["loss"]))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._found.gathered_bytes = int(getattr(self._trainer, "gathered_bytes", 0))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for file in sorted(Path(args.output_dir).glob("checkpoint-*/*.safetensors")):
            with safe_open(file, "pt") as tensors:
                self._found.saved |= {name: fingerprint(tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, parameter in self._trainer.model.named_parameters():
            local = getattr(parameter, "ds_tensor", parameter)
            local = local.to_local() if hasattr(local, "to_local") else local
            self._found.weights[name] = fingerprint(local)


def fingerprint(tensor: torch.Tensor) -> float:
    """A number that tells tensors apart: a sum with weights that differ from place to place."""
    flat = tensor.detach().double().flatten()
    return float((flat * torch.linspace(0.5, 1.5, flat.numel(), dtype=torch.float64)).sum())


# ---- how it is planted ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def planted(name: str | None, job: Job) -> Iterator[None]:
    """One failure in every job that is proved meanwhile."""
    with contextlib.ExitStack() as stack:
        for table, target, wrap in (
            (ENGINE, "engine_of", _engine),
            (ARGUMENTS, "make_arguments", _changed),
            (BUILT, "build", _rebuilt),
            (TRAINER, "make_trainer", _changed_first),
        ):
            if name in table:
                change: Any = table[name]
                stack.enter_context(swapped(proof, target, wrap(getattr(proof, target), change)))
        if name in AROUND:
            stack.enter_context(AROUND[name](job))
        yield


@contextlib.contextmanager
def instead(other: Job | None) -> Iterator[None]:
    """Build and train another job than the one that is proved: its levers, its batches, its schedule."""
    if other is None:
        yield
        return
    plan, materials = other.plan, other.materials
    engine, arguments, build, trainer = proof.engine_of, proof.make_arguments, proof.build, proof.make_trainer
    steps = count_steps(plan.recipe, len(other.train), plan.forecast.hardware.ranks)

    def its(job: Job) -> Job:
        return dataclasses.replace(job, plan=plan, materials=materials)

    with contextlib.ExitStack() as stack:
        for name, value in (
            ("engine_of", lambda _: engine(plan)),
            ("make_arguments", lambda job, _, made: arguments(its(job), steps, made)),
            ("build", lambda *_: build(plan, materials)),
            ("make_trainer", lambda job, *rest: trainer(its(job), *rest)),
        ):
            stack.enter_context(swapped(proof, name, value))
        yield


def known() -> set[str]:
    """The names of all failures that can be planted."""
    return {*ENGINE, *ARGUMENTS, *BUILT, *TRAINER, *AROUND}


def _changed(right: Callable[..., Any], change: Callable[[Any], None]) -> Callable[..., Any]:
    def make(*args: Any, **named: Any) -> Any:
        made = right(*args, **named)
        change(made)
        return made

    return make


def _changed_first(right: Callable[..., Any], change: Callable[[Any], None]) -> Callable[..., Any]:
    def make(*args: Any, **named: Any) -> Any:
        made = right(*args, **named)
        change(made[0])
        return made

    return make


def _rebuilt(right: Callable[..., Built], change: Callable[[Built], Built | None]) -> Callable[..., Built]:
    def make(*args: Any, **named: Any) -> Built:
        made = right(*args, **named)
        return change(made) or made

    return make


def _engine(right: Callable[..., Any], change: Callable[[dict[str, Any]], None]) -> Callable[..., Any]:
    def make(*args: Any, **named: Any) -> Any:
        made = right(*args, **named)
        config = copy.deepcopy(dict(made.config))
        change(config)
        return dataclasses.replace(made, config=config)

    return make
