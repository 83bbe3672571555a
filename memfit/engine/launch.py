"""Start the processes of a run on this machine through torch's own launcher, and say why one failed."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from memfit.engine.proof import PROOF, prove
from memfit.engine.stall import stalled
from memfit.engine.train import Job, Trained, train
from memfit.engine.worker import RESULT
from memfit.errors import ProofFailed, RunFailed, UserError
from memfit.inputs.processes import prepare_allocator
from memfit.inputs.run_folder import read_json
from memfit.monitor.proof_card import card
from memfit.monitor.proof_tables import failed_line
from memfit.specs.proof import ProofKind

SHOWN_LINES = 6  # of a traceback that nobody expected


def run_job(job: Job) -> Trained:
    """Run a job: in this process where the plan has one rank without an engine, else in processes of its own.

    The run folder must hold plan.json and data.json: the ranks read them, not the recipe. Raises what the first failing
    rank raised, RunFailed with its last words for anything unknown, KeyboardInterrupt when stopped.
    """
    recipe, hardware = job.plan.recipe, job.plan.forecast.hardware
    if recipe.levers.parallel == "none":
        return train(job)
    _refuse_other_machines(job)
    prepare_allocator(recipe.levers.allocator == "expandable")  # the ranks inherit it before they import torch
    words = ["-m", "memfit.engine.worker", str(job.folder.path), *(["--pilot"] if job.pilot else [])]
    start(words, hardware.gpus_per_node, job.folder.path / "logs")
    found = read_json(job.folder.path / "logs" / RESULT)
    return Trained(**{**found, "folder": Path(found["folder"]), "model": Path(found["model"])})


def prove_job(job: Job, kind: ProofKind, say: Callable[[str], None], quiet: bool = False) -> dict[str, Any]:
    """Prove a job before it is run, where it would be: in this process, or in processes of its own.

    `say` hears the card; with `quiet` only one that failed. Returns the values of proof.json, which the run folder has
    in any case. Raises ProofFailed where something asked for is not in effect, else as `run_job`.
    """
    if job.plan.recipe.levers.parallel == "none":
        prove(job, kind)
    else:
        _refuse_other_machines(job)
        ranks = job.plan.forecast.hardware.gpus_per_node
        words = ["-m", "memfit.engine.worker", str(job.folder.path), "--proof", kind]
        start([*words, *(["--pilot"] if job.pilot else [])], ranks, job.folder.path / "logs")
    found: dict[str, Any] = read_json(job.folder.path / PROOF)
    failed = failed_line(found)
    if failed is not None or not quiet:
        say(card(found))
    if failed is not None:
        raise ProofFailed(f"{failed[0]}; the whole proof is in {job.folder.path / PROOF}", failed[1])
    return found


def _refuse_other_machines(job: Job) -> None:
    """Processes are started on this machine only. The run folder holds all that the others need."""
    hardware = job.plan.forecast.hardware
    if hardware.nodes > 1:
        raise UserError(
            f"{hardware.text} are {hardware.nodes} machines, and each starts its own processes; {job.folder.path}, "
            "which all must see, is ready",
            f"on each: torchrun --nnodes {hardware.nodes} --nproc-per-node {hardware.gpus_per_node} --rdzv-backend "
            f"c10d --rdzv-endpoint FIRST_MACHINE:29500 -m memfit.engine.worker {job.folder.path} (docs/nodes.md)",
        )


def start(words: Sequence[str], ranks: int, logs: Path) -> None:
    """Run `python WORDS` in `ranks` processes and wait for all. The first speaks here, all others into `logs`."""
    logs.mkdir(parents=True, exist_ok=True)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a failure is told below, once
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=logs.parent.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=dict.fromkeys(range(1, ranks), Std.ALL)),
    )
    try:
        elastic_launch(config, sys.executable)(*words)
    except ChildFailedError as error:
        raise explained(logs, error) from None
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise RunFailed(f"stopped by {error.sigval.name}", "earlier checkpoints are whole") from None


def explained(logs: Path, error: ChildFailedError) -> Exception:
    """The error of the rank that failed first: the others usually only miss it."""
    waiting = stalled(logs)
    if waiting:
        return RunFailed(
            f"the ranks waited for each other too long and were ended: {'; '.join(waiting)}",
            f"the whole stacks are under {logs}; earlier checkpoints are whole",
        )
    told = sorted((_failure(path) for path in logs.glob("rank-*.failed.json")), key=lambda failure: failure["time"])
    rank, failure = error.get_first_failure()
    silent = failure.exitcode < 0 and str(rank) not in {other["rank"] for other in told}
    if not told or (silent and not told[0]["known"]):
        how = f"by {failure.signal_name()}" if failure.exitcode < 0 else f"with exit code {failure.exitcode}"
        killed = failure.exitcode == -signal.SIGKILL
        return RunFailed(
            f"rank {rank} ended {how} and left no word",
            "the kernel kills a process when host memory is full: dmesg tells; use fewer ranks or less offload"
            if killed
            else f"its output is under {logs}",
        )
    first = told[0]
    if first["known"]:
        kinds = {"UserError": UserError, "ProofFailed": ProofFailed}
        return kinds.get(first["kind"], RunFailed)(first["problem"], first["hint"])
    last = "".join(first["traceback"]).rstrip().splitlines()[-SHOWN_LINES:]
    return RunFailed(
        f"rank {first['rank']} failed: {first['problem']}\n" + "\n".join(f"  {line}" for line in last),
        f"the whole traceback is in {first['path']}; earlier checkpoints are whole",
    )


def _failure(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found | {"path": path, "rank": path.name.split(".")[0].removeprefix("rank-")}
