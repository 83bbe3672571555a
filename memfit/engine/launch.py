"""Start the processes of a run on this machine through torch's own launcher, and say why one failed."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from memfit.engine.stall import stalled
from memfit.engine.train import Job, Trained, train
from memfit.engine.worker import RESULT
from memfit.errors import RunFailed, UserError
from memfit.inputs.run_folder import read_json

SHOWN_LINES = 6  # of a traceback that nobody expected


def run_job(job: Job) -> Trained:
    """Run a job: in this process where the plan has one rank without an engine, else in processes of its own.

    The run folder must hold plan.json and data.json: the ranks read them, not the recipe. Raises what the first failing
    rank raised, RunFailed with its last words for anything unknown, KeyboardInterrupt when stopped.
    """
    recipe, hardware = job.plan.recipe, job.plan.forecast.hardware
    if recipe.levers.parallel == "none":
        return train(job)
    if hardware.nodes > 1:
        raise UserError(
            f"{hardware.text} are {hardware.nodes} machines, and this one starts only its own processes",
            f"start torchrun --nnodes {hardware.nodes} --nproc-per-node {hardware.gpus_per_node} -m "
            f"memfit.engine.worker {job.folder.path} on each",
        )
    words = ["-m", "memfit.engine.worker", str(job.folder.path), *(["--pilot"] if job.pilot else [])]
    start(words, hardware.gpus_per_node, job.folder.path / "logs")
    found = read_json(job.folder.path / "logs" / RESULT)
    return Trained(**{**found, "folder": Path(found["folder"]), "model": Path(found["model"])})


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
        kind = UserError if first["kind"] == "UserError" else RunFailed
        return kind(first["problem"], first["hint"])
    last = "".join(first["traceback"]).rstrip().splitlines()[-SHOWN_LINES:]
    return RunFailed(
        f"rank {first['rank']} failed: {first['problem']}\n" + "\n".join(f"  {line}" for line in last),
        f"the whole traceback is in {first['path']}; earlier checkpoints are whole",
    )


def _failure(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found | {"path": path, "rank": path.name.split(".")[0].removeprefix("rank-")}
