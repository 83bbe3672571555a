"""A user's own trainer in the words of a recipe, as far as a recipe can say it: what is forecast is what they hold."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from memfit.catalog.optimizers import OPTIMIZERS
from memfit.engine.readback.adapters import FOUR_BIT, adapted_layers, variant_of
from memfit.engine.readback.live import Live
from memfit.engine.readback.parameters import PartCounts, count_parts
from memfit.errors import UserError
from memfit.families import family_for
from memfit.families.base import Family
from memfit.families.names import base_name
from memfit.inputs import machine
from memfit.planner.counting import LORA_DTYPES
from memfit.specs.hardware import Hardware
from memfit.specs.recipe import Data, HardwareKeys, Levers, Lora, Recipe, Schedule

ONE_PART = "language"  # what every name is where memfit does not know the model
SHORT = {full: short for short, full in LORA_DTYPES.items()}
ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flash"}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
# (dtype of what learns, of what is frozen, of autocast) -> levers.precision; None: nothing of the kind.
PRECISIONS: Mapping[tuple[str | None, str | None, str | None], str] = {
    ("float32", None, None): "fp32",
    ("float32", "float32", None): "fp32",
    (None, "float32", None): "fp32",
    ("float32", None, "bfloat16"): "bf16-amp",
    ("float32", "bfloat16", "bfloat16"): "bf16-amp",
    (None, "bfloat16", "bfloat16"): "bf16-amp",
    ("float32", None, "float16"): "fp16-amp",
    ("float32", "float16", "float16"): "fp16-amp",
    (None, "float16", "float16"): "fp16-amp",
    ("bfloat16", None, None): "pure-bf16",
    ("bfloat16", "bfloat16", None): "pure-bf16",
    (None, "bfloat16", None): "pure-bf16",
}


@dataclass(frozen=True)
class Described:
    """The recipe of a trainer, or why there is none: `unsaid` names what no recipe says, in plain words."""

    recipe: Recipe | None
    unsaid: tuple[str, ...] = ()


def known_family(model: nn.Module) -> Family | None:
    """memfit's family of a live model by its model_type; None for one that it does not know."""
    config = getattr(model, "config", None)
    try:
        return family_for({"model_type": getattr(config, "model_type", None)})
    except UserError:
        return None


def finder(model: nn.Module, family: Family | None) -> Callable[[str], str]:
    """Gives the part of a parameter's name; `ONE_PART` for all where the family's names are not the model's."""
    if family is None:
        return lambda name: ONE_PART

    def part_of(name: str) -> str:
        return family.part_of(base_name(name))

    try:
        for name, _ in model.named_parameters():
            part_of(name)
    except KeyError:
        return lambda name: ONE_PART
    return part_of


def hardware_of(trainer: Any) -> Hardware:
    """What the trainer's ranks run on, as many as it has."""
    found = machine.detect() if trainer.args.device.type == "cuda" else None
    ranks = int(trainer.args.world_size)
    if found is not None and found.gpu is not None:
        each = min(ranks, found.gpus_per_node)
        return dataclasses.replace(found, gpus_per_node=each, nodes=max(1, ranks // each))
    return Hardware(gpu=None, gpus_per_node=ranks, host_memory_bytes=machine.host_memory_bytes())


def deepspeed_of(trainer: Any) -> dict[str, Any]:
    """The DeepSpeed configuration as it was given, with what transformers filled in; empty without DeepSpeed."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None) if trainer.is_deepspeed_enabled else None
    return dict(getattr(getattr(plugin, "hf_ds_config", None), "config", {}) or {})


def describe(live: Live, hardware: Hardware) -> Described:
    """The recipe that forecasts this trainer."""
    unsaid: list[str] = []
    counts = count_parts(live)
    layers = adapted_layers(live)
    lora = _lora(layers, counts, unsaid)
    packed = any(type(module).__name__ == FOUR_BIT for module in live.model.modules())
    recipe = Recipe(
        model=str(getattr(getattr(live.model, "config", None), "model_type", "model")),
        data=Data(eval=0),
        method="qlora" if packed else "lora" if layers else "full",
        parts=_parts(counts, layers, live, unsaid),  # type: ignore[arg-type]
        lora=lora,
        levers=_levers(live, counts, bool(layers), unsaid),
        batch=_batch(live),
        schedule=_schedule(live.trainer.args),
        hardware=HardwareKeys(gpus=hardware.text, host_memory=hardware.host_memory_bytes),
        engine={"deepspeed": deepspeed_of(live.trainer)} if live.trainer.is_deepspeed_enabled else {},
        seed=int(live.trainer.args.seed),
    )
    if live.family is None:
        unsaid.append(f"model_type {recipe.model!r}, which memfit does not know")
    return Described(None if unsaid else recipe, tuple(unsaid))


def _batch(live: Live) -> int:
    args = live.trainer.args
    return int(args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps)


def _parts(
    counts: Mapping[str, PartCounts], layers: Mapping[str, Any], live: Live, unsaid: list[str]
) -> dict[str, str]:
    adapted = {live.part_of(name + ".weight") for name in layers}
    found: dict[str, str] = {}
    for part, each in counts.items():
        if part in adapted:
            found[part] = "lora"
            if each.learning and not any(".modules_to_save." in name for name, _ in live.model.named_parameters()):
                unsaid.append(f"{part} has adapters, and {each.learning.total():,} of its own parameters learn")
        elif not each.trainable:
            found[part] = "frozen"
        elif not each.frozen:
            found[part] = "full"
        else:
            unsaid.append(f"{each.trainable:,} of {each.trainable + each.frozen.total():,} parameters of {part} learn")
    return found


def _lora(layers: Mapping[str, Any], counts: Mapping[str, PartCounts], unsaid: list[str]) -> Lora:
    if not layers:
        return Lora()
    each = list(layers.values())
    ranks = {rank for layer in each for rank in layer.r.values()}
    alphas = {alpha for layer in each for alpha in layer.lora_alpha.values()}
    variants = {variant_of(layer, name) for layer in each for name in layer.r}
    drops = {float(getattr(module, "p", 0.0)) for layer in each for module in layer.lora_dropout.values()}
    dtypes = {dtype for part in counts.values() for dtype in part.adapters}
    for what, values in (("rank", ranks), ("alpha", alphas), ("variant", variants), ("dropout", drops)):
        if len(values) > 1:
            unsaid.append(f"adapters of several values of {what}: {', '.join(map(str, sorted(values)))}")
    if len(dtypes) != 1 or not dtypes <= set(SHORT):
        unsaid.append(f"adapters in {', '.join(sorted(dtypes))}")
        dtypes = {"float32"}
    return Lora(
        rank=int(min(ranks)),
        alpha=float(min(alphas)),
        dropout=min(drops, default=0.0),
        targets=tuple(layers),
        variant=min(variants),  # type: ignore[arg-type]
        dtype=SHORT[dtypes.pop()],  # type: ignore[arg-type]
    )


def _levers(live: Live, counts: Mapping[str, PartCounts], adapted: bool, unsaid: list[str]) -> Levers:
    trainer = live.trainer
    args, model = trainer.args, live.model
    row = next((row.name for row in OPTIMIZERS.values() if row.engine_name == str(args.optim.value)), None)
    if row is None or trainer.optimizer_cls_and_kwargs is not None:
        unsaid.append(f"optimizer {args.optim.value}")
    attention = str(getattr(getattr(model, "config", None), "_attn_implementation", "sdpa"))
    if attention not in ATTENTION:
        unsaid.append(f"attention {attention}")
    zero = bool(trainer.is_deepspeed_enabled)
    if trainer.is_fsdp_enabled or args.n_gpu > 1 or args.torch_compile or args.use_liger_kernel:
        unsaid.append("FSDP, DataParallel, torch.compile or Liger's kernels in a script of one's own")
    return Levers(
        # Under DeepSpeed its file decides precision and layout (memfit.planner.user_engine).
        precision="auto" if zero else _precision(live, counts, unsaid),  # type: ignore[arg-type]
        optimizer=row or "adamw",
        checkpointing="full" if recomputes(live) else "none",
        loss="full-logits",
        attention=ATTENTION.get(attention, "sdpa"),  # type: ignore[arg-type]
        parallel="auto" if zero else "ddp" if args.world_size > 1 else "none",
        micro_batch=int(args.per_device_train_batch_size),
    )


def recomputes(live: Live) -> bool:
    """Whether checkpointing is asked for, by the arguments or already on the model."""
    on = any(getattr(module, "gradient_checkpointing", False) is True for module in live.model.modules())
    return on or bool(live.trainer.args.activation_checkpointing)


def _precision(live: Live, counts: Mapping[str, PartCounts], unsaid: list[str]) -> str:
    learning, frozen = Counter[str](), Counter[str]()
    for each in counts.values():
        learning, frozen = learning + each.learning, frozen + each.frozen
    args = live.trainer.args
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    if len(learning) > 1 or len(set(frozen) - {"nf4", "fp4"}) > 1:
        unsaid.append("weights of several dtypes")
    wide = next(iter(learning), None), next(iter(set(frozen) - {"nf4", "fp4"}), None), autocast
    if wide not in PRECISIONS:
        said = f"weights that learn in {wide[0]}, frozen ones in {wide[1]}, autocast {wide[2] or 'off'}"
        unsaid.append(said)
    return PRECISIONS.get(wide, "fp32")


def _schedule(args: Any) -> Schedule:
    """Of no effect on memory; the nearest that a recipe says."""
    return Schedule(
        learning_rate=float(args.learning_rate),
        kind=SCHEDULES.get(str(args.lr_scheduler_type.value), "cosine"),  # type: ignore[arg-type]
        weight_decay=float(args.weight_decay),
        clip=float(args.max_grad_norm or 0.0),
    )


def learning_bytes(live: Live) -> dict[str, tuple[int, int]]:
    """part -> (bytes of its parameters, bytes of those that learn), whole, as they are kept now."""
    found: dict[str, tuple[int, int]] = {}
    for name, parameter in live.model.named_parameters():
        share = getattr(parameter, "ds_tensor", parameter)
        size = int(getattr(parameter, "ds_numel", parameter.numel())) * share.element_size()
        all_, learning = found.get(live.part_of(name), (0, 0))
        found[live.part_of(name)] = (all_ + size, learning + (size if parameter.requires_grad else 0))
    return found
