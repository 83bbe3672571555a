"""Failures of models: adapters, what learns, what is kept in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from memfit.build import adapters as build_adapters
from memfit.build import loss as losses
from memfit.build.build import Built
from memfit.build.checkpointing import Recompute, selective_contexts
from memfit.engine.train import Job
from tests.faults.tables import AROUND, BUILT, TRAINER, AtBegin, at, swapped

# ---- adapters


@contextlib.contextmanager
def _lora(change: Callable[[dict[str, Any]], dict[str, Any]], job: Job) -> Iterator[None]:
    make = build_adapters.LoraConfig
    with swapped(build_adapters, "LoraConfig", lambda **named: make(**change(named))):
        yield


AROUND["adapters on the attention alone"] = functools.partial(
    _lora, lambda n: {**n, "target_modules": [m for m in n["target_modules"] if "self_attn" in m]}
)
AROUND["adapters in the vision tower"] = functools.partial(
    _lora, lambda n: {**n, "target_modules": sorted({m.rpartition(".")[2] for m in n["target_modules"]})}
)
AROUND["adapters of another rank"] = functools.partial(_lora, lambda n: {**n, "r": 2 * n["r"]})
AROUND["whole copies beside adapters"] = functools.partial(_lora, lambda n: {**n, "modules_to_save": ["merger"]})


def _layers(built: Built) -> Iterator[Any]:
    return (module for module in built.model.modules() if hasattr(module, "lora_A"))


@at(BUILT, "adapters detached")
def _detached(built: Built) -> None:
    for layer in _layers(built):
        for module in layer.lora_B.values():
            module.register_forward_hook(lambda module, args, output: output.detach())


@at(BUILT, "adapters switched off")
def _off(built: Built) -> None:
    built.model.base_model.disable_adapter_layers()  # type: ignore[union-attr, operator]
    for name, parameter in built.model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "lora_" in name)


@at(BUILT, "adapters in bf16")
def _narrow(built: Built) -> None:
    for name, parameter in built.model.named_parameters():
        if build_adapters.is_adapter(name):
            parameter.data = parameter.data.to(torch.bfloat16)


@at(BUILT, "adapters scaled twice")
def _scaled(built: Built) -> None:
    for layer in _layers(built):
        layer.scaling = {name: 2 * value for name, value in layer.scaling.items()}


@at(BUILT, "adapter dropout otherwise")
def _dropping(built: Built) -> None:
    for layer in _layers(built):
        for name in list(layer.lora_dropout):
            layer.lora_dropout[name] = nn.Dropout(0.5)


# ---- what learns


def _learn(part: str, value: bool, built: Built) -> None:
    for name, parameter in built.model.named_parameters():
        if built.part_of(name) == part:
            parameter.requires_grad_(value)


BUILT["connector frozen"] = functools.partial(_learn, "connector", False)


@at(BUILT, "vision detached")
def _vision_detached(built: Built) -> None:
    blocks = [m for n, m in built.model.named_modules() if n.endswith("post_layernorm")]
    blocks[0].register_forward_hook(lambda module, args, output: output.detach())


@at(BUILT, "frozen tower with a graph")
def _rearmed(built: Built) -> None:
    built.model.enable_input_require_grads()  # type: ignore[operator]


# ---- memory


def _blocks(built: Built, part: str) -> list[Any]:
    return [
        module
        for name, module in built.model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and built.part_of(name) == part
    ]


@at(BUILT, "vision not checkpointed")
def _vision_kept(built: Built) -> None:
    for block in _blocks(built, "vision"):
        block.gradient_checkpointing = False


@at(BUILT, "every second block checkpointed")
def _every_second(built: Built) -> None:
    for block in _blocks(built, "language")[1::2]:
        block.gradient_checkpointing = False


@at(BUILT, "checkpointing keeps products")
def _selective(built: Built) -> None:
    for block in _blocks(built, "language"):
        block._gradient_checkpointing_func = Recompute(selective_contexts)


@at(BUILT, "eager attention")
def _eager(built: Built) -> None:
    built.model.set_attn_implementation("eager")  # type: ignore[operator]


@at(BUILT, "full logits")
def _full_logits(built: Built) -> Built:
    for name, module in list(built.model.named_modules()):
        if isinstance(module, losses.DeferredHead):
            head = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            head.weight, head.bias = module.weight, module.bias
            parent, _, child = name.rpartition(".")
            setattr(built.model.get_submodule(parent), child, head)
    return dataclasses.replace(built, loss=losses.causal_loss)


def _keep_outputs(trainer: Any, take: Callable[[Any], Any]) -> None:
    right, kept = trainer.compute_loss_func, []

    def loss(outputs: Any, *args: Any, **named: Any) -> Any:
        kept.append(take(outputs))
        return right(outputs, *args, **named)

    trainer.compute_loss_func = loss


TRAINER["logits kept alive"] = functools.partial(_keep_outputs, take=lambda outputs: outputs.logits.detach().clone())


@at(BUILT, "hidden states kept")
def _hidden(built: Built) -> Built:
    built.model.config.get_text_config().output_hidden_states = True  # type: ignore[union-attr, operator]
    built.model.config.output_hidden_states = True  # type: ignore[union-attr]
    right, kept = built.loss, []

    def loss(outputs: Any, *args: Any, **named: Any) -> Any:
        kept.append(outputs)
        return right(outputs, *args, **named)

    return dataclasses.replace(built, loss=loss)


@at(TRAINER, "weights copied")
def _copied(trainer: Any) -> None:
    class Average(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.kept = {name: tensor.detach().clone() for name, tensor in kwargs["model"].named_parameters()}

    trainer.add_callback(Average())


def _arrays(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [array for each in value for array in _arrays(each)]
    return [value] if hasattr(value, "nbytes") else []


@at(TRAINER, "evaluation keeps logits")
def _metrics(trainer: Any) -> None:
    def count(predictions: Any) -> dict[str, float]:
        trainer.gathered_bytes = sum(array.nbytes for array in _arrays(predictions.predictions))
        return {}

    trainer.compute_metrics = count
    trainer.args.prediction_loss_only = False


@at(BUILT, "weights in fp32")
def _wide(built: Built) -> None:
    built.model.float()


@at(TRAINER, "frozen tower learns")
def _released(trainer: Any) -> None:
    def release(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or ".vision_tower." in name)

    trainer.add_callback(AtBegin(release))
