"""Runs in every rank: python planted.py FILE proves all cases of a JSON file one after another, in one group."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from memfit.engine import worker
from memfit.engine.ranks import rank

sys.path.insert(0, str(Path(__file__).parents[2]))  # the script runs by its path
from tests import jobs, planting
from tests.planting import swapped


def main(file: Path) -> None:
    """Each case is {"folder", "plant": name or null, "follow", "other": folder or null}; FOLDER/ran.RANK.json tells."""
    try:
        with one_group():
            for case in json.loads(file.read_text()):
                prove(case)
    except BaseException as error:
        worker.write_failure(file.parent / "logs" / worker.FAILURE.format(rank=rank()), error)
        raise
    torch.distributed.destroy_process_group()


@contextlib.contextmanager
def one_group() -> Iterator[None]:
    """A proof ends its process group; here the next one goes on with it."""
    with swapped(torch.distributed, "destroy_process_group", lambda *args: None):
        yield


def prove(case: dict[str, Any]) -> None:
    """One case; an error that every rank meets is written down, and the next case goes on."""
    folder = Path(case["folder"])
    job = jobs.read_job(folder, case["follow"])
    worker.join(job.plan.forecast.hardware)
    found: dict[str, Any]
    try:
        other = jobs.read_job(Path(case["other"]), False) if case["other"] else None
        ran = planting.run(job, case["plant"], case["follow"], other=other)
        found = asdict(ran) | {"proof": ran.proof.to_json() if ran.proof else None}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    (folder / f"ran.{rank()}.json").write_text(json.dumps(found))
    jobs.forget()
    gc.collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
