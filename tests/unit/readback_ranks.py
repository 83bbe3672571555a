"""Runs in every rank: python readback_ranks.py FILE reads runs back, healthy and with errors planted in them.

Each case is {"folder": run folder with plan.json and data.json}. The first rank writes checks.json there: name of the
error ("" for none) -> levers that failed, with what was found and the evidence.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

sys.path.insert(0, str(Path(__file__).parents[2]))  # the script runs by its path
from memfit.engine import train as engine_train
from memfit.engine import worker
from memfit.engine.gather import is_split
from memfit.engine.ranks import is_first, rank
from memfit.engine.readback.handles import fsdp_groups, zero_of
from memfit.engine.readback.live import Facts, Live, live_of
from memfit.engine.readback.optimizer import innermost
from memfit.engine.readback.read import ReadBack, read_back
from memfit.engine.train import train
from memfit.inputs.processes import rank_facts
from memfit.inputs.run_folder import RunFolder
from memfit.specs.proof import Check
from tests.invariant.cases import forget

Fault = Callable[[Live], Any]


@contextlib.contextmanager
def put(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute with another value."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


@contextlib.contextmanager
def other_rate(live: Live, only: int | None) -> Iterator[None]:
    """Another learning rate, on one rank or on all."""
    group = innermost(live.trainer.optimizer).param_groups[0]
    old = group["initial_lr"]
    if only in (None, rank()):
        group["initial_lr"] = 7e-3
    try:
        yield
    finally:
        group["initial_lr"] = old


@contextlib.contextmanager
def gathered(live: Live) -> Iterator[None]:
    """Every parameter whole at rest, as where nothing lets go of them."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(live.model.parameters())):
        yield


@contextlib.contextmanager
def computing_in(live: Live, dtype: torch.dtype) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _, group in fsdp_groups(live):
            stack.enter_context(put(group, "mp_policy", MixedPrecisionPolicy(dtype, dtype)))
        yield


@contextlib.contextmanager
def staying_gathered(live: Live) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _, group in fsdp_groups(live):
            stack.enter_context(put(group, "post_forward_mesh_info", None))
        yield


def faults(parallel: str) -> Mapping[str, Fault]:
    """Errors of one engine, planted in its live objects."""
    common: dict[str, Fault] = {
        "rate on rank 1": lambda live: other_rate(live, 1),
        "rate on all": lambda live: other_rate(live, None),
    }
    if parallel.startswith("zero"):
        common |= {
            "small bucket": lambda live: put(zero_of(live), "reduce_bucket_size", 7),
            "no clipping": lambda live: put(zero_of(live), "clip_grad", 0.0),
        }
    if parallel in ("zero1", "zero2"):
        common |= {
            "another stage": lambda live: put(zero_of(live), "partition_gradients", parallel == "zero1"),
            "offload": lambda live: put(zero_of(live), "cpu_offload", not zero_of(live).cpu_offload),
        }
    if parallel == "zero3":
        common |= {
            "gathered": gathered,
            "offload": lambda live: put(zero_of(live), "offload_param", not zero_of(live).offload_param),
            "persistent": lambda live: put(zero_of(live).parameter_offload, "param_numel_persistence_threshold", 9),
        }
    if parallel == "fsdp":
        common |= {
            "fp16": lambda live: computing_in(live, torch.float16),
            "stays gathered": staying_gathered,
        }
    if parallel == "ddp":
        common |= {"bucket view": lambda live: put(live.wrapped, "gradient_as_bucket_view", True)}
    return common


class Planting(ReadBack):
    """Reads a run back, then once more with each error in it, before its first step."""

    found: dict[str, Any]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        live, self.found = self._live, {}
        assert live is not None
        assert self._plan is not None
        for name, fault in faults(str(self._plan.recipe.levers.parallel)).items():
            with fault(live):
                self.found[name] = failed(read_back(live, self._plan, self._facts))


def failed(checks: tuple[Check, ...]) -> dict[str, list[str]]:
    return {check.lever: [check.found, check.evidence] for check in checks if check.ok is False}


def main(file: Path) -> None:
    try:
        for case in json.loads(file.read_text()):
            run(RunFolder(Path(case["folder"])))
            forget()
    except BaseException as error:
        worker.write_failure(file.parent / "logs" / worker.FAILURE.format(rank=rank_facts().rank), error)
        raise
    torch.distributed.destroy_process_group()


def run(folder: RunFolder) -> None:
    (folder.path / "logs").mkdir(exist_ok=True)
    job = worker.job_of(folder, pilot=False)
    worker.join(job.plan.forecast.hardware)
    make, box = engine_train._trainer, {}

    def with_reading(job: Any, built: Any, arguments: Any, engine: Any, log: Any) -> Any:
        split = is_split(built.model)
        trainer, recorder = make(job, built, arguments, engine, log)
        facts = Facts(arguments.max_steps, len(job.train), len(job.evaluate), engine.notes)
        live = functools.partial(live_of, trainer, built, split_at_load=split)
        box["reader"] = Planting(live, job.plan, facts)
        trainer.add_callback(box["reader"])
        return trainer, recorder

    engine_train._trainer = with_reading
    try:
        train(job)
    finally:
        engine_train._trainer = make
    reader = box["reader"]
    if is_first():
        every = {"": failed(reader.checks), "levers": [check.lever for check in reader.checks if check.ok]}
        (folder.path / "checks.json").write_text(json.dumps(every | reader.found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
