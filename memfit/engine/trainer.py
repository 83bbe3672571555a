"""The one Trainer subclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

IGNORED = -100  # labels without loss


@dataclass
class StepCounts:
    """What the micro-batches of one optimizer step held; read and reset by the recording callback."""

    tokens: int = 0
    padded_tokens: int = 0
    trained_tokens: int = 0
    micro_batches: int = 0


@dataclass(frozen=True)
class PartRates:
    """The learning rate of every part that learns, and which part a parameter belongs to."""

    by_part: Mapping[str, float]
    part_of: Callable[[str], str]


@dataclass
class Hooks:
    """What memfit adds to a Trainer: rates by part, counts by step, and how weights are written."""

    rates: PartRates
    save_weights: Callable[[nn.Module, Path], None]
    counts: StepCounts = field(default_factory=StepCounts)


class MemfitTrainer(Trainer):
    """transformers' Trainer with three methods of its own.

    - `create_optimizer`: one group of parameters for each part and decay, so that every part has its learning rate.
    - `training_step`: counts real, padded and trained tokens before the step runs.
    - `_save`: writes the weights as memfit does (adapters and trained parts apart, the source's own files beside them).
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args: Any, hooks: Hooks, **kwargs: Any) -> None:
        self.hooks = hooks
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer named by the arguments over groups that carry their part's name and rate."""
        live = self.model if model is None else model
        if self.optimizer is None:
            kind, values = self.get_optimizer_cls_and_kwargs(self.args, live)
            self.optimizer = kind(self._groups(live), **values)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch, counted."""
        counts = self.hooks.counts
        padded = inputs["input_ids"].numel()
        mask = inputs.get("attention_mask")
        counts.padded_tokens += padded
        counts.tokens += padded if mask is None else int(mask.sum())
        # The first label of a row is never a target: the loss looks one token ahead.
        counts.trained_tokens += int((inputs["labels"][:, 1:] != IGNORED).sum())
        counts.micro_batches += 1
        return super().training_step(model, inputs, num_items_in_batch)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self.hooks.save_weights(self.accelerator.unwrap_model(self.model), Path(output_dir or self.args.output_dir))

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        rates = self.hooks.rates
        decays = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((rates.part_of(name), name in decays), []).append(parameter)
        return [
            {
                "params": parameters,
                "part": part,
                "lr": rates.by_part[part],
                "weight_decay": self.args.weight_decay if decay else 0.0,
            }
            for (part, decay), parameters in groups.items()
        ]
