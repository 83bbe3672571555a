"""What differs between ranks on GPUs and ranks on the CPU, as far as it shows without a GPU."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from memfit.build.build import Materials
from memfit.build.device import device_for, place_buffers
from memfit.build.supported import refuse_what_is_not_built
from memfit.catalog.gpus import parse_hardware
from memfit.engine import engines, launch
from memfit.engine.engines import Engine
from memfit.engine.ranks import largest, summed
from memfit.engine.train import Job
from memfit.engine.trainer import Hooks, MemfitTrainer, PartRates
from memfit.errors import UserError
from memfit.inputs import machine
from memfit.inputs.run_folder import RunFolder, write_json
from memfit.specs.recipe import Recipe
from memfit.trace.prepare import prepare

Make = Callable[..., Recipe]
TWO = "hardware.gpus=2xRTX3090"


@pytest.mark.parametrize(
    ("parallel", "precision"),
    [
        ("ddp", "bf16-amp"),
        ("zero1", "bf16-mixed"),
        ("zero2", "bf16-mixed"),
        ("zero3", "pure-bf16"),
        ("fsdp", "bf16-amp"),
    ],
)
def test_every_layout_on_gpus_is_let_through(recipe: Make, parallel: str, precision: str) -> None:
    wanted = recipe("llama", TWO, f"levers.parallel={parallel}", f"levers.precision={precision}")
    refuse_what_is_not_built(prepare(wanted).plan().recipe)
    alone = recipe(
        "llama", "hardware.gpus=1xRTX3090", "levers.parallel=zero2", "levers.offload=optimizer",
        "levers.precision=bf16-mixed", "levers.allocator=expandable",
    )  # fmt: skip
    refuse_what_is_not_built(prepare(alone).plan().recipe)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`cards(2)`: torch and the driver say that there are two GPUs, and CUDA is never started."""

    def there(count: int) -> None:
        facts = machine.TorchFacts("2.13.0+cu130", "13.0", ("sm_86",), is_available=True)
        monkeypatch.setattr("memfit.build.device.torch_facts", lambda: facts)
        monkeypatch.setattr(machine, "detected_gpus", lambda: ())
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)

        def started() -> int:
            raise AssertionError("CUDA was started in the process that starts the ranks")

        monkeypatch.setattr(torch.cuda, "current_device", started)

    return there


def test_each_rank_has_its_own_gpu(cards: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    cards(2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_for(parse_hardware("2xRTX3090")) == torch.device("cuda", 1)
    monkeypatch.delenv("LOCAL_RANK")
    assert device_for(parse_hardware("1xRTX3090")) == torch.device("cuda", 0)


def test_more_gpus_than_there_are_is_told_before_anything_starts(cards: Callable[[int], None]) -> None:
    cards(1)
    with pytest.raises(UserError, match="2xRTX3090, and torch sees 1 GPU on this machine"):
        device_for(parse_hardware("2xRTX3090"))
    # Of two machines each has what it needs.
    assert device_for(parse_hardware("2x1xRTX3090")).type == "cuda"


def test_buffers_follow_where_parameters_were_placed() -> None:
    """A stand-in for a GPU: buffers alone change place, shared names and values stay."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    place_buffers(model, torch.device("meta"))
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_one_process_uses_one_gpu(tmp_path: Path) -> None:
    """transformers counts all that it sees, and would wrap the model in DataParallel with as many times the batch."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=3, report_to=[], save_strategy="no"
    )
    assert arguments.n_gpu == 0
    arguments._n_gpu = 4
    assert arguments.train_batch_size == 12
    hooks = Hooks(PartRates({}, lambda name: ""), lambda model, folder: None, Engine("none", {}))
    MemfitTrainer(model=nn.Linear(2, 2), args=arguments, hooks=hooks)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 3)


def plan_of(recipe: Recipe) -> Any:
    return prepare(recipe).plan()


def test_engines_on_gpus_say_that_nobody_has_measured_them(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "check_cuda_p2p_ib_support", lambda: False)
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    (note,) = engines.engine_of(
        plan_of(recipe("llama", TWO, "levers.parallel=ddp", "levers.allocator=expandable"))
    ).notes
    assert note.startswith("ddp on GPUs")
    assert "no GPU has confirmed it" in note
    assert told == [os.environ["PYTORCH_ALLOC_CONF"]] == ["expandable_segments:True"]
    assert os.environ["NCCL_P2P_DISABLE"] == "1"
    assert engines.engine_of(plan_of(recipe("llama", "hardware.gpus=1xRTX3090"))).notes == ()
    assert engines.engine_of(plan_of(recipe("llama", "hardware.gpus=2xcpu", "levers.parallel=ddp"))).notes == ()


def test_ranks_inherit_the_allocators_setting(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the ranks are started the environment already has it: torch reads it once, when it starts CUDA."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    prepared = prepare(recipe("llama", TWO, "levers.parallel=ddp", "levers.allocator=expandable"))
    job = Job(
        prepared.plan(), Materials(prepared.source, prepared.family, prepared.profile), (), (), RunFolder(tmp_path)
    )
    seen: list[str] = []

    def start(words: list[str], ranks: int, logs: Path, *rest: Any) -> None:
        seen.append(os.environ["PYTORCH_ALLOC_CONF"])
        logs.mkdir(exist_ok=True)
        values = {field.name: None for field in dataclasses.fields(launch.Trained)}
        write_json(logs / "result.json", {**values, "folder": str(tmp_path), "model": str(tmp_path)})

    monkeypatch.setattr(launch, "start", start)
    launch.run_job(job)
    assert seen == ["max_split_size_mb:64,expandable_segments:True"]


def test_numbers_of_one_process_are_its_own() -> None:
    assert summed((3, 4), torch.device("cpu")) == largest((3, 4), torch.device("cpu")) == [3, 4]
