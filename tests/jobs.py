"""Jobs of tiny models for the tests of planted failures: a run folder, and the job that a rank reads from it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from memfit.engine import worker
from memfit.engine.train import Job
from memfit.inputs.data import load_samples
from memfit.inputs.data.options import check_options
from memfit.inputs.encode import Encoder
from memfit.inputs.recipe_file import load_recipe
from memfit.inputs.run_folder import RunFolder, write_json
from memfit.planner.plan import plan_json
from memfit.trace.prepare import prepare

COMMON = (
    "data.eval=0",
    "image.max_slices=1",
    "levers.precision=fp32",
    "levers.checkpointing=none",
    "levers.loss=full-logits",
    "levers.micro_batch=2",
    "schedule.steps=8",
    "schedule.learning_rate=1e-3",
    "lora.rank=4",
    "lora.dropout=0",
    "run.save_every=1000",
)
# Below the threshold a tensor is not split; the tests' models hold no other. CPU ranks pin nothing.
SPLIT = 'engine={"zero": {"stage3_param_persistence_threshold": 0}}'
NOT_PINNED = "levers.pin_memory=false"
OFFLOADED, ALL_OFFLOADED = ("levers.offload=optimizer", NOT_PINNED), ("levers.offload=params+optimizer", NOT_PINNED)
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "ddp": ("levers.parallel=ddp",),
    "zero1": ("levers.parallel=zero1",),
    "zero2": ("levers.parallel=zero2",),
    "zero2, optimizer offloaded": ("levers.parallel=zero2", *OFFLOADED),
    "zero3": ("levers.parallel=zero3", SPLIT),
    "zero3, optimizer offloaded": ("levers.parallel=zero3", SPLIT, *OFFLOADED),
    "zero3, all offloaded": ("levers.parallel=zero3", SPLIT, *ALL_OFFLOADED),
    "fsdp": ("levers.parallel=fsdp",),
    "fsdp, all offloaded": ("levers.parallel=fsdp", *ALL_OFFLOADED),
}


def settings(layout: str, sets: Sequence[str], data: Path) -> list[str]:
    """The recipe of a layout as `--set` words; two ranks but for "none"."""
    ranks = 1 if layout == "none" else 2
    where = (f"data.train={data}", f"hardware.gpus={ranks}xcpu", f"batch={4 * ranks}")
    return [*where, *COMMON, *LAYOUTS[layout], *sets]


def write_job(folder: Path, model: Path, sets: Sequence[str]) -> Path:
    """A run folder with plan.json and data.json of a recipe."""
    recipe = load_recipe(None, [*sets, f"run.folder={folder}"], model=str(model))
    prepared = prepare(recipe)
    plan = prepared.plan()
    loaded = load_samples(recipe.data, check_options(recipe), Encoder(prepared.source, recipe.image))
    run = RunFolder(folder)
    (folder / "logs").mkdir(parents=True)
    write_json(run.plan, plan_json(plan))
    write_json(run.data, {"split": loaded.split.to_json()})
    return folder


def read_job(folder: Path, forecast: bool) -> Job:
    """The job of a run folder, as a rank reads it. `forecast`: with the bytes of activations."""
    return worker.job_of(RunFolder(folder), pilot=False, forecast=forecast)


def forget() -> None:
    """What accelerate and transformers keep between two runs of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ.pop(name, None)
