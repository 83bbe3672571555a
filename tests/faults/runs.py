"""Failures of runs: arguments, optimizer, data, checkpoints, engines."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from memfit.build.build import Built
from memfit.build.data import IGNORED, SampleDataset
from memfit.build.pixels import PixelReader
from memfit.engine import proof
from memfit.engine.train import Job
from memfit.families.names import base_name
from memfit.inputs.encode import Encoder
from memfit.specs.recipe import ImageBudget
from tests.faults.tables import (
    AROUND,
    BUILT,
    ENGINE,
    TRAINER,
    AtBegin,
    at,
    setting,
    swapped,
    swapped_global,
)

setting("betas otherwise", adam_beta2=0.5)
setting("no clipping", max_grad_norm=0.0)
setting("another schedule", lr_scheduler_type="linear")
setting("another warm-up", warmup_steps=4)
setting("no accumulation", gradient_accumulation_steps=1)
setting("another micro-batch", per_device_train_batch_size=1)
setting("another seed", seed=1, data_seed=1)


@at(AROUND, "autocast off")
@contextlib.contextmanager
def _no_autocast(job: Job) -> Iterator[None]:
    from transformers import TrainingArguments

    make = proof.make_arguments.__globals__["TrainingArguments"]
    without = functools.partial(_without, make=make)
    with swapped_global(proof.make_arguments, "TrainingArguments", without):
        yield
    assert make is TrainingArguments


def _without(make: Any, **named: Any) -> Any:
    return make(**{**named, "bf16": False})


@at(AROUND, "autocast by the environment")
@contextlib.contextmanager
def _environment(job: Job) -> Iterator[None]:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    try:
        yield
    finally:
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


# ---- optimizer and schedule


@at(TRAINER, "another optimizer")
def _sgd(trainer: Any) -> None:
    trainer.optimizer = torch.optim.SGD(_parted(trainer), lr=1e-3)


@at(TRAINER, "optimizer without the connector")
def _too_early(trainer: Any) -> None:
    trainer.optimizer = torch.optim.AdamW(
        [group for group in _parted(trainer) if group["parts"] != ["connector"]], fused=True
    )


def _parted(trainer: Any) -> list[dict[str, Any]]:
    trainer.hooks.rates = dataclasses.replace(trainer.hooks.rates, together=False)
    groups: list[dict[str, Any]] = trainer._groups(trainer.model)
    return groups


@at(TRAINER, "decay on norms and biases")
def _decays(trainer: Any) -> None:
    groups = _parted(trainer)
    trainer._groups = lambda model: [{**group, "weight_decay": trainer.args.weight_decay} for group in groups]


@at(TRAINER, "one part's rate otherwise")
def _rate(trainer: Any) -> None:
    groups = _parted(trainer)
    trainer._groups = lambda model: [
        {**group, "lr": group["lr"] * (10 if group["parts"] == ["connector"] else 1)} for group in groups
    ]


@at(TRAINER, "evaluation mode")
def _eval(trainer: Any) -> None:
    trainer.model.train = lambda mode=True: nn.Module.train(trainer.model, False)


# ---- data


def _collated(change: Callable[[Any, dict[str, Any]], dict[str, Any]], built: Built) -> Built:
    right = built.collator
    return dataclasses.replace(built, collator=lambda rows: change(built, right(rows)))


def _labelled(make: Callable[[dict[str, Any]], torch.Tensor]) -> Callable[[Built], Built]:
    return functools.partial(_collated, lambda built, batch: {**batch, "labels": make(batch)})


BUILT["all labels masked"] = _labelled(lambda batch: torch.full_like(batch["labels"], IGNORED))
BUILT["prompts trained"] = _labelled(lambda batch: batch["input_ids"].clone())
BUILT["labels shifted"] = _labelled(lambda batch: batch["labels"].roll(-1, 1))


@at(BUILT, "placeholders trained")
def _unmasked(built: Built) -> Built:
    token = built.encoder.image_token_id

    def make(batch: dict[str, Any]) -> torch.Tensor:
        return torch.where(batch["input_ids"] == token, batch["input_ids"], batch["labels"])

    return _labelled(make)(built)


@at(BUILT, "pictures cut")
def _cut(built: Built) -> Built:
    token, text = built.encoder.image_token_id, ("input_ids", "attention_mask", "labels")

    def cut(rows: Any) -> Any:
        return right([{k: v[row["input_ids"] != token] for k, v in row.items() if k in text} for row in rows])

    right = built.collator
    return dataclasses.replace(built, collator=cut)


@at(BUILT, "pixel cap ignored")
def _uncapped(built: Built) -> Built:
    encoder = Encoder(built.encoder.source, ImageBudget(max_slices=9))
    return dataclasses.replace(built, encoder=encoder, pixels=PixelReader(built.family, encoder.processor_settings))


@at(TRAINER, "rows dropped")
def _dropped(trainer: Any) -> None:
    whole: SampleDataset = trainer.train_dataset
    whole.samples = [*whole.samples][:-2]


# ---- saving


@at(TRAINER, "adapters not saved")
def _unsaved(trainer: Any) -> None:
    right, hooks = trainer.hooks.save_weights, trainer.hooks

    def save(model: nn.Module, folder: Path) -> None:
        right(model, folder)
        for file in folder.glob("adapter_model.safetensors"):
            save_file({n: t * (0 if "lora_B" in n else 1) for n, t in load_file(file).items()}, file)

    hooks.save_weights = save


@at(TRAINER, "connector not saved")
def _unsaved_connector(trainer: Any) -> None:
    right, hooks = trainer.hooks.save_weights, trainer.hooks

    def save(model: nn.Module, folder: Path) -> None:
        right(model, folder)
        for file in folder.glob("trained_parts.safetensors"):
            file.unlink()

    hooks.save_weights = save


# ---- engines


@at(ENGINE, "misspelt key")
def _misspelt(config: dict[str, Any]) -> None:
    config["gradient_cliping"] = config.pop("gradient_clipping")


@at(ENGINE, "another stage")
def _stage(config: dict[str, Any]) -> None:
    config["zero_optimization"]["stage"] = 1


@at(ENGINE, "offload none")
def _none(config: dict[str, Any]) -> None:
    config["zero_optimization"].pop("offload_optimizer")


@at(ENGINE, "parameters not offloaded")
def _no_param(config: dict[str, Any]) -> None:
    config["zero_optimization"].pop("offload_param")


@at(ENGINE, "nothing split")
def _persistent(config: dict[str, Any]) -> None:
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 10**9


@at(ENGINE, "a small bucket")
def _bucket(config: dict[str, Any]) -> None:
    config["zero_optimization"]["reduce_bucket_size"] = 1000


@at(ENGINE, "scheduler of the engine")
def _scheduler(config: dict[str, Any]) -> None:
    values = {"lr_range_test_min_lr": 1e-4, "lr_range_test_step_size": 1, "lr_range_test_step_rate": 1.0}
    config["scheduler"] = {"type": "LRRangeTest", "params": values}


@at(AROUND, "zero.Init inactive")
@contextlib.contextmanager
def _whole(job: Job) -> Iterator[None]:
    right, arguments = proof.build, proof.make_arguments
    made: list[Any] = []

    def keeping(*args: Any, **named: Any) -> Any:
        made.append(arguments(*args, **named))
        return made[-1]

    def late(*args: Any, **named: Any) -> Built:
        unset_hf_deepspeed_config()
        built = right(*args, **named)
        set_hf_deepspeed_config(made[-1].hf_deepspeed_config)
        return built

    with swapped(proof, "build", late), swapped(proof, "make_arguments", keeping):
        yield


@at(TRAINER, "one rank's rate")
def _one_rank(trainer: Any) -> None:
    if torch.distributed.get_rank() == 1:
        groups = _parted(trainer)
        trainer._groups = lambda model: [{**group, "lr": group["lr"] * 10} for group in groups]


@at(TRAINER, "a parameter kept from DDP")
def _ignored(trainer: Any) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = trainer.model
    names = [n for n, p in model.named_parameters() if p.requires_grad and "merger.mlp" in base_name(n)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    # A proof gives all ranks one batch: other dropout stands for other samples.
    trainer.add_callback(AtBegin(lambda model: torch.manual_seed(torch.distributed.get_rank())))


@at(TRAINER, "blocks stay gathered")
def _gathered(trainer: Any) -> None:
    trainer.add_callback(AtBegin(lambda model: model.set_reshard_after_forward(False)))


@at(TRAINER, "tower not wrapped")
def _unwrapped(trainer: Any) -> None:
    plugin = trainer.accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = [n for n in plugin.transformer_cls_names_to_wrap if "Decoder" in n]
