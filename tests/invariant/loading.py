"""How much memory of its own each rank takes until training begins: python loading.py FOLDER, one rank of a run.

Unique set size, sampled: pages that are shared with other processes (libraries, a mapped checkpoint) do not count.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[2]))  # the script runs by its path

from memfit.engine import train as engine_train
from memfit.engine import worker
from memfit.engine.launch import start
from memfit.inputs.processes import rank_facts
from memfit.inputs.run_folder import RunFolder
from tests.invariant.trajectories import Case, Common, _job

EVERY_SECONDS = 0.005


class Peak(threading.Thread):
    """Samples the unique set size of this process until `stop`; `peak` and `last` are bytes above the beginning."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._begin = self._process.memory_full_info().uss
        self._done = threading.Event()
        self.peak = self.last = 0

    def run(self) -> None:
        while not self._done.wait(EVERY_SECONDS):
            self.last = self._process.memory_full_info().uss - self._begin
            self.peak = max(self.peak, self.last)

    def stop(self) -> None:
        self._done.set()
        self.join()
        self.last = self._process.memory_full_info().uss - self._begin


class UntilItTrains(TrainerCallback):
    """Ends the process when everything is prepared, and says what it took."""

    def __init__(self, peak: Peak, file: Path) -> None:
        self._peak = peak
        self._file = file
        self._built = peak.peak

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._peak.stop()
        found = {"built": self._built, "peak": self._peak.peak, "after": self._peak.last}
        self._file.write_text(json.dumps(found))
        torch.distributed.barrier()
        os._exit(0)


def main(folder: Path) -> None:
    """One rank."""
    job = worker.job_of(RunFolder(folder), pilot=False)
    worker.join(job.plan.forecast.hardware)
    engine_train.engine_of(job.plan)  # DeepSpeed's own memory is not the model's
    peak = Peak()
    peak.start()
    make = engine_train._trainer

    def with_watch(*args: Any) -> Any:
        trainer, recorder = make(*args)
        trainer.add_callback(UntilItTrains(peak, folder / f"peak.{rank_facts().rank}.json"))
        return trainer, recorder

    engine_train._trainer = with_watch
    engine_train.train(job)


def peaks(common: Common, case: Case, root: Path, ranks: int) -> list[dict[str, int]]:
    """Bytes by rank: the peak while the model is loaded, the peak until training begins, and what is left then."""
    folder = _job(common, case, root).folder.path
    (folder / "logs").mkdir()
    start([str(Path(__file__)), str(folder)], ranks, folder / "logs")
    return [json.loads((folder / f"peak.{rank}.json").read_text()) for rank in range(ranks)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
