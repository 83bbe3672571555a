"""One rank of a run: python -m memfit.engine.worker RUN_FOLDER, started by `memfit.engine.launch` or by torchrun."""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

import torch
from torch import distributed

from memfit.build.build import Materials
from memfit.engine.proof import prove
from memfit.engine.ranks import PATIENCE
from memfit.engine.train import Job, Trained, train
from memfit.errors import MemfitError, UserError
from memfit.inputs.data import load_samples
from memfit.inputs.data.options import check_options
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import require_weights
from memfit.inputs.processes import prepare_environment, rank_facts
from memfit.inputs.recipe_file import recipe_from
from memfit.inputs.run_folder import RunFolder, open_run_folder, read_json, write_json
from memfit.planner.worst import Chosen
from memfit.specs.hardware import Hardware
from memfit.specs.proof import ProofKind
from memfit.trace.forecast import load_of
from memfit.trace.prepare import prepare
from memfit.trace.worst import worst_plan

FAILURE = "rank-{rank}.failed.json"
RESULT = "result.json"


def main(folder: Path, pilot: bool, proof: ProofKind | None = None) -> int:
    """Run this rank, or prove it; the first writes the result. A failure is written down for whoever started the ranks.

    `proof`: a proof of the run instead of the run.
    """
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    facts = rank_facts()
    try:
        job = job_of(open_run_folder(folder), pilot, forecast=proof is not None)
        join(job.plan.forecast.hardware)
        if proof is not None:
            prove(job, proof)
        else:
            done = train(job)
            if facts.rank == 0:
                write_json(logs / RESULT, result_json(done))
        if distributed.is_initialized():
            distributed.destroy_process_group()
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        write_failure(logs / FAILURE.format(rank=facts.rank), error)
        print(traceback.format_exc(), file=sys.stderr)
        return error.exit_code if isinstance(error, MemfitError) else 1
    return 0


def join(hardware: Hardware) -> None:
    """Make this process a member of the run's group: gloo between CPU ranks, NCCL (and gloo for the host) else."""
    cpu, facts = hardware.gpu is None, rank_facts()
    prepare_environment(cpu)
    # The ranks of a machine share its cores: on CPU ranks all of the work, beside GPUs the optimizer that is offloaded.
    torch.set_num_threads(max(1, torch.get_num_threads() // hardware.gpus_per_node))
    if not cpu:
        torch.cuda.set_device(facts.local_rank)
    if not distributed.is_initialized():
        distributed.init_process_group("gloo" if cpu else "cpu:gloo,cuda:nccl", timeout=PATIENCE)


def job_of(folder: RunFolder, pilot: bool, forecast: bool = False) -> Job:
    """The job that plan.json and data.json of a run folder describe. Raises UserError when the data has changed.

    `forecast`: its plan holds the whole forecast, as a proof needs it.
    """
    recipe = recipe_from(read_json(folder.plan)["recipe"], str(folder.plan))
    prepared = prepare(recipe)
    plan, source = prepared.plan(), require_weights(prepared.source)
    encoder = Encoder(source, recipe.image)
    loaded = load_samples(recipe.data, check_options(recipe), encoder)
    if read_json(folder.data)["split"] != loaded.split.to_json():
        raise UserError(
            f"{recipe.data.train} has changed since {folder.plan} was written", "start the run again from its recipe"
        )
    worst: tuple[Chosen, ...] = ()
    if forecast:
        load = load_of(prepared, (*loaded.train_costs, *loaded.eval_costs), loaded.reading)
        plan, worst = worst_plan(prepared, (loaded.train, loaded.train_costs), encoder, load)
    materials = Materials(source, prepared.family, prepared.profile)
    known = (loaded.train_costs, loaded.eval_costs, worst)
    return Job(plan, materials, loaded.train, loaded.eval, folder, pilot, loaded.most_pixels, *known)


def write_failure(path: Path, error: BaseException) -> None:
    """What went wrong on one rank, as a person can read it and `launch` can tell it."""
    known = isinstance(error, MemfitError)
    first = next(iter(str(error).strip().splitlines()), "")
    value = {
        "time": time.time(),
        "kind": type(error).__name__,
        "problem": getattr(error, "problem", first) if known else f"{type(error).__name__}: {first}",
        "hint": getattr(error, "hint", "") if known else "",
        "known": known,
        "traceback": traceback.format_exception(error),
    }
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def result_json(done: Trained) -> dict[str, object]:
    """A result as plain JSON values."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(done).items()}


if __name__ == "__main__":
    asked: ProofKind | None = None
    if "--proof" in sys.argv[2:]:
        asked = "quick" if sys.argv[sys.argv.index("--proof") + 1] == "quick" else "full"
    sys.exit(main(Path(sys.argv[1]), "--pilot" in sys.argv[2:], asked))
