"""What is read back: the live objects of one rank, and what was asked for. No file is read for either."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from memfit.build.build import Built
from memfit.families.base import Family
from memfit.inputs.encode import Encoder
from memfit.specs.plan import Plan

Batch = Mapping[str, Any]  # tensors as the model's forward takes them, with `labels`
AUTO = "auto"


@dataclass(frozen=True)
class Live:
    """The live objects of one rank.

    `trainer`: prepared, as in `on_train_begin` (model_wrapped, optimizer and lr_scheduler as accelerate or DeepSpeed
    wrapped them). `model`: the one whose names `part_of` knows, inside any wrapper. `batches`: collated micro-batches,
    the worst first; none: the trainer's own data set is collated, one sample at a time. `decode`: ids to text with
    special tokens; None where nobody knows the tokenizer. `split_at_load`: whether the model was split before an engine
    took it (zero.Init); None where nobody looked. `train_samples`, `eval_samples`: rows of the run, where the trainer's
    data set is another (a proof's worst batches). `family` and `encoder` are None for a trainer that memfit did not
    build: what needs them is then found and not judged.
    """

    trainer: Trainer
    model: nn.Module
    part_of: Callable[[str], str]
    batches: tuple[Batch, ...] = ()
    decode: Callable[[Sequence[int]], str] | None = None
    image_token_id: int | None = None
    family: Family | None = None
    encoder: Encoder | None = None
    split_at_load: bool | None = None
    train_samples: int | None = None
    eval_samples: int | None = None

    @property
    def wrapped(self) -> Any:
        """The model as the engine wrapped it: DDP, DeepSpeed's engine, or the model itself."""
        return self.trainer.model_wrapped

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device(self.trainer.args.device)


@dataclass(frozen=True)
class Facts:
    """What was planned and no plan holds; None: not known, then what is found is stated and not judged.

    `total_steps`: optimizer steps of the whole run, over which the schedule is laid. `train_samples`, `eval_samples`:
    rows after the split. `notes`: what an engine had to choose otherwise than planned (`Engine.notes`).
    """

    total_steps: int | None = None
    train_samples: int | None = None
    eval_samples: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """The plan, if there is one, and what stands beside it. `lever`, `key`: None where nothing was asked."""

    plan: Plan | None
    facts: Facts = field(default_factory=Facts)

    def key(self, dotted: str) -> Any:
        """A value of the effective recipe by its dotted key; None for `auto`, and without a plan."""
        value: Any = None if self.plan is None else self.plan.recipe
        for name in dotted.split("."):
            value = None if value is None else getattr(value, name)
        return None if isinstance(value, str) and value == AUTO else value

    def lever(self, name: str) -> Any:
        """A value of `levers`."""
        return self.key(f"levers.{name}")


def live_of(trainer: Trainer, built: Built, batches: Sequence[Batch] = (), **more: Any) -> Live:
    """The live objects of a trainer that memfit built. `more`: any of the last three fields of `Live`."""
    return Live(
        trainer=trainer,
        # Under FSDP2 the trainer's model is the one that carries the engine; elsewhere both are the same.
        model=trainer.model if isinstance(trainer.model, nn.Module) else built.model,
        part_of=built.part_of,
        batches=tuple(batches),
        decode=functools.partial(built.encoder.decode, special=True),
        image_token_id=built.encoder.image_token_id,
        family=built.family,
        encoder=built.encoder,
        **more,
    )
