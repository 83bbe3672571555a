"""Runs in every rank: python cases.py FILE trains all cases of a JSON file one after another, in one process group."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from memfit.build.build import Built
from memfit.build.loss import ChunkedLoss
from memfit.engine import train as engine_train
from memfit.engine import worker
from memfit.engine.train import train
from memfit.engine.trainer import MemfitTrainer
from memfit.inputs.processes import rank_facts
from memfit.inputs.run_folder import RunFolder

sys.path.insert(0, str(Path(__file__).parents[2]))  # the script runs by its path
from tests.invariant.live import Watch

Step = Callable[..., torch.Tensor]
CHUNK = 4  # positions of a chunked loss: the tests' answers must take several, and each rank another number


def main(file: Path) -> None:
    """Each case is {"folder": run folder with plan.json and data.json, "fault": name or null}."""
    try:
        run(json.loads(file.read_text()))
    except BaseException as error:
        worker.write_failure(file.parent / "logs" / worker.FAILURE.format(rank=rank_facts().rank), error)
        raise


def run(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        folder = RunFolder(Path(case["folder"]))
        (folder.path / "logs").mkdir(exist_ok=True)
        job = worker.job_of(folder, pilot=False)
        worker.join(job.plan.forecast.hardware)
        with planted(case["fault"]), watched(folder.path), small_chunks():
            train(job)
        forget()
    torch.distributed.destroy_process_group()


def forget() -> None:
    """What accelerate and transformers keep between two runs of a process: the next would train under DeepSpeed too."""
    gc.collect()
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ.pop(name, None)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """The run, with a callback that writes down what this rank holds."""
    make = engine_train._trainer

    def with_watch(*args: Any) -> Any:
        trainer, recorder = make(*args)
        trainer.add_callback(Watch(folder))
        return trainer, recorder

    engine_train._trainer = with_watch
    try:
        yield
    finally:
        engine_train._trainer = make


@contextlib.contextmanager
def small_chunks() -> Iterator[None]:
    """A chunked loss takes CHUNK positions at a time."""
    make = engine_train.build

    def small(*args: Any, **kwargs: Any) -> Built:
        built = make(*args, **kwargs)
        if not isinstance(built.loss, ChunkedLoss):
            return built
        return dataclasses.replace(built, loss=dataclasses.replace(built.loss, chunk=CHUNK))

    engine_train.build = small  # type: ignore[assignment]
    try:
        yield
    finally:
        engine_train.build = make


@contextlib.contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """The same run with an error in it."""
    right: Step = MemfitTrainer.compute_loss
    wrong = {"scaled": _scaled, "dropped": _dropped, "mean of means": _mean_of_means}
    if fault is not None:
        MemfitTrainer.compute_loss = wrong[fault](right)  # type: ignore[method-assign]
    try:
        yield
    finally:
        MemfitTrainer.compute_loss = right  # type: ignore[method-assign]


def _scaled(right: Step) -> Step:
    """The same loss, 0.99 of its gradient."""

    def compute(self: MemfitTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = right(self, *args, **kwargs)
        return loss.detach() + 0.99 * (loss - loss.detach())

    return compute


def _dropped(right: Step) -> Step:
    """The last micro-batch of a step adds nothing."""

    def compute(self: MemfitTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        last = self.hooks.counts.micro_batches == self.args.gradient_accumulation_steps
        return right(self, *args, **kwargs) * (0.0 if last else 1.0)

    return compute


def _mean_of_means(right: Step) -> Step:
    """Each micro-batch weighs the same, however many tokens it trains."""

    def compute(self: MemfitTrainer, model: Any, inputs: Any, **kwargs: Any) -> torch.Tensor:
        kwargs["num_items_in_batch"] = None
        # Without a trained token, as where ranks are filled up, a mean is 0 / 0.
        return right(self, model, inputs, **kwargs).nan_to_num() / self.args.gradient_accumulation_steps

    return compute


if __name__ == "__main__":
    main(Path(sys.argv[1]))
