"""The one Trainer subclass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer

from memfit.engine.engines import Engine, host_adam
from memfit.engine.sampling import FilledDataset, FilledSampler
from memfit.engine.stochastic import StochasticAdamW

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
    """The learning rate of every part that learns, and which part a parameter belongs to.

    `together`: the parts share one rate, so that one group holds them, as the forecast counts engines that flatten.
    """

    by_part: Mapping[str, float]
    part_of: Callable[[str], str]
    together: bool = False


@dataclass
class Hooks:
    """What memfit adds to a Trainer: rates by part, counts by step, how weights are written, and the engine.

    `save_weights` is called by every rank. `rounding_seed`: AdamW rounds bf16 weights by chance; None: it does not.
    `order`: how samples are drawn instead of by the seed.
    """

    rates: PartRates
    save_weights: Callable[[nn.Module, Path], None]
    engine: Engine
    counts: StepCounts = field(default_factory=StepCounts)
    rounding_seed: int | None = None
    order: Sampler[int] | None = None


class MemfitTrainer(Trainer):
    """transformers' Trainer with five methods of its own.

    - `create_optimizer`: one group of parameters for each rate and decay, so that every part has its learning rate.
    - `training_step`: counts real, padded and trained tokens before the step runs.
    - `save_model`: writes the weights as memfit does (adapters and trained parts apart, the source's own files beside
      them), gathered tensor by tensor where they are split.
    - `create_accelerator_and_postprocess`: tells accelerate what the arguments have no word for.
    - `_get_train_sampler`: several ranks see one rank's order, and no sample twice; a proof has an order of its own.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, *args: Any, hooks: Hooks, **kwargs: Any) -> None:
        self.hooks = hooks
        arguments: Any = kwargs["args"]
        if arguments.n_gpu > 1:
            # One process uses one GPU. transformers would wrap the model in DataParallel where it sees several, and
            # multiply the batch (training_args: _setup_devices).
            arguments._n_gpu = 1
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer named by the arguments over groups that carry their parts' names and rate."""
        live = self.model if model is None else model
        if self.optimizer is None:
            kind, values = self.get_optimizer_cls_and_kwargs(self.args, live)
            learning = {p.dtype for p in live.parameters() if p.requires_grad}
            if self.hooks.rounding_seed is not None and torch.bfloat16 in learning:
                values = {name: values[name] for name in ("lr", "betas", "eps")} | {"seed": self.hooks.rounding_seed}
                kind = StochasticAdamW
            if self.hooks.engine.config.get("zero_force_ds_cpu_optimizer"):
                self.optimizer = host_adam(self._groups(live), values, self.hooks.engine.config)
            else:
                self.optimizer = kind(self._groups(live), **values)
            if values.get("optim_bits") == 8:
                keep_embeddings_wide(live)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch, counted."""
        counts, ids = self.hooks.counts, inputs["input_ids"]
        mask = inputs.get("attention_mask")
        # The first label of a row is never a target: the loss looks one token ahead.
        trained = (inputs["labels"][:, 1:] != IGNORED).sum(1)
        # Several ranks are filled up to equal batches with rows that carry no loss; these are not the user's samples.
        real = trained > 0 if self.args.world_size > 1 else torch.ones_like(trained, dtype=torch.bool)
        tokens = torch.full_like(trained, ids.shape[1]) if mask is None else mask.sum(1)
        counts.padded_tokens += ids.numel()
        counts.tokens += int(tokens[real].sum())
        counts.trained_tokens += int(trained.sum())
        counts.micro_batches += 1
        return super().training_step(model, inputs, num_items_in_batch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights. Every rank must call."""
        # `self.model` is the inner one, except under FSDP2, which wraps nothing.
        self.hooks.save_weights(self.model, Path(output_dir or self.args.output_dir))

    def create_accelerator_and_postprocess(self) -> None:
        """The accelerator, with the engine's remaining values."""
        super().create_accelerator_and_postprocess()
        # A step's micro-batches are taken together (Trainer.get_batch_samples). accelerate would put all of them on the
        # device at once; so they wait in host memory, and training_step moves one (Trainer._prepare_inputs).
        self.accelerator.device_placement = False
        self.hooks.engine.finish(self.accelerator, self.model, self.args)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.hooks.order is not None:
            return self.hooks.order
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if not isinstance(dataset, FilledDataset):
            return super()._get_train_sampler(train_dataset)
        unit = self.args.world_size * self.args.per_device_train_batch_size
        return FilledSampler(dataset, unit, self.args.data_seed)

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        rates = self.hooks.rates
        # Without decay there is nothing that norms and biases would be kept from.
        decays = set(self.get_decay_parameter_names(model)) if self.args.weight_decay else set()
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        held: dict[tuple[str, bool], set[str]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                part = rates.part_of(name)
                key = "" if rates.together else part, name in decays
                groups.setdefault(key, []).append(parameter)
                held.setdefault(key, set()).add(part)
        return [
            {
                "params": parameters,
                "parts": sorted(held[key]),
                "lr": rates.by_part[min(held[key])],
                "weight_decay": self.args.weight_decay if key[1] else 0.0,
            }
            for key, parameters in groups.items()
        ]


def keep_embeddings_wide(model: nn.Module) -> None:
    """bitsandbytes' 8-bit optimizers keep 32-bit states of embeddings, as transformers.Trainer.create_optimizer has it:
    a row's second moment moves seldom and far."""
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
