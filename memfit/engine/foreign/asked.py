"""What a user's script asked for, in its own words, against what its live objects show: arguments, PEFT, DeepSpeed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from transformers.optimization import get_scheduler

from memfit.engine.foreign.described import deepspeed_of
from memfit.engine.readback.adapters import EIGHT_BIT, FOUR_BIT, adapted_layers
from memfit.engine.readback.attention import kinds_of
from memfit.engine.readback.checkpointing import blocks_by_part
from memfit.engine.readback.engines import offload_of
from memfit.engine.readback.handles import engine_of_deepspeed, parallel_of, stage_of
from memfit.engine.readback.live import Live
from memfit.engine.readback.optimizer import base_rate, groups_of, innermost
from memfit.engine.readback.parameters import dtype_of, unpacked_numel
from memfit.engine.readback.reading import Reading, compared, stated
from memfit.engine.readback.schedule import probes, scheduler_of
from memfit.engine.readback.seen import Seen
from memfit.strategies.user_deepspeed import offload_of as offload_asked
from memfit.strategies.user_deepspeed import read as one_spelling
from memfit.units import gib

HOST_ADAM = "DeepSpeedCPUAdam"
ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flash"}


def before(live: Live) -> Iterator[Reading]:
    """What stands before the first step."""
    yield from _engine(live)
    yield from _weights(live)
    yield _optimizer(live)
    yield _rate(live)
    yield _schedule(live)
    yield from _batch(live)
    yield from _lora(live)
    yield from _quantised(live)


def after(live: Live, seen: Seen) -> Iterator[Reading]:
    """What only steps show."""
    yield from _checkpointing(live, seen)
    yield _autocast(live, seen)
    yield from _attention(live, seen)


# ---- engine -------------------------------------------------------------------------------------------------------


def _engine(live: Live) -> Iterator[Reading]:
    args, found = live.trainer.args, parallel_of(live)
    config = one_spelling(deepspeed_of(live.trainer)).config
    where = f"the model is wrapped in {type(live.wrapped).__name__} on {args.world_size} ranks"
    if args.deepspeed is not None:
        stage = int((config.get("zero_optimization") or {}).get("stage", 0))
        asked = f"zero{stage}" if stage else "deepspeed without ZeRO"
        fix = "start the script by accelerate or torchrun, and give the file to TrainingArguments(deepspeed=...)"
        yield compared("deepspeed: zero_optimization.stage", asked, found, f"{where}, ZeRO stage {stage_of(live)}", fix)
        yield _offload(live, config)
        return
    asked = "fsdp" if args.fsdp else "ddp" if int(args.world_size) > 1 else "none"
    fix = "one process a GPU: torchrun --nproc-per-node N script.py; accelerate takes no FSDP on CPU ranks"
    yield compared("args (parallel)", asked, found, where, fix)


def _offload(live: Live, config: Mapping[str, Any]) -> Reading:
    wanted = offload_asked(config)
    what, where, pinned = offload_of(live)
    asked = wanted["offload"] if wanted["offload"] == "none" else f"{wanted['offload']} to {wanted['offload_to']}"
    return compared(
        "deepspeed: offload",
        asked,
        what if what == "none" else f"{what} to {where}",
        f"flags of {type(getattr(live.wrapped, 'optimizer', live.wrapped)).__name__}, {'' if pinned else 'not '}pinned",
        "offload_param acts under stage 3 only, and each offload block needs device: cpu",
    )


# ---- weights ------------------------------------------------------------------------------------------------------


def _weights(live: Live) -> Iterator[Reading]:
    """What learns at all, and what the dtype of the weights makes of `bf16` and `fp16`."""
    learning = Counter[str]()
    for parameter in live.model.parameters():
        if parameter.requires_grad:
            learning[dtype_of(parameter)] += unpacked_numel(parameter)
    yield Reading(
        "requires_grad",
        "something learns",
        f"{learning.total():,} parameters learn" if learning else "nothing learns",
        bool(learning),
        ", ".join(f"{dtype}: {count:,}" for dtype, count in sorted(learning.items())) or "every parameter is frozen",
        "release what is to learn: requires_grad_(True), or a LoraConfig whose targets are in the model",
    )
    args = live.trainer.args
    if args.deepspeed is None and (args.bf16 or args.fp16) and "float32" in learning:
        name = "bf16" if args.bf16 else "fp16"
        wide = learning["float32"]
        yield stated(
            f"args.{name} (weights)",
            f"{wide:,} parameters that learn are float32",
            f"args.{name} casts products, not weights: weights, gradients and AdamW's states of these take "
            f"{gib(16 * wide)}, in 16 bit {gib(8 * wide)}",
        )
    frozen = sum(p.numel() for p in live.model.parameters() if not p.requires_grad and p.dtype == torch.float32)
    if frozen and (args.bf16 or args.fp16) and args.deepspeed is None:
        yield stated(
            "frozen weights",
            f"{frozen:,} in float32",
            f"from_pretrained(dtype=torch.bfloat16) would hold them in {gib(2 * frozen)} instead of {gib(4 * frozen)}",
        )


# ---- optimizer and schedule ---------------------------------------------------------------------------------------


def _optimizer(live: Live) -> Reading:
    trainer, inner = live.trainer, innermost(live.trainer.optimizer)
    found, config = type(inner).__name__, deepspeed_of(trainer)
    block = (config.get("optimizer") or {}).get("type")
    where = f"{type(inner).__module__}.{type(inner).__qualname__} inside trainer.optimizer"
    if trainer.optimizer_cls_and_kwargs is not None:
        return compared("optimizer_cls_and_kwargs", trainer.optimizer_cls_and_kwargs[0].__name__, found, where)
    name = f"args.optim {trainer.args.optim.value}"
    if block is not None:
        return stated(f"{name}", found, f"the DeepSpeed file's optimizer block ({block}) replaces it; {where}")
    wanted, values = trainer.get_optimizer_cls_and_kwargs(trainer.args, live.model)
    if found == HOST_ADAM and "AdamW" in wanted.__name__:
        return stated(name, found, "accelerate takes DeepSpeed's Adam for the host where states are offloaded")
    fused = bool(inner.param_groups[0].get("fused"))
    asked = f"{wanted.__name__}{', fused' if values.get('fused') else ''}"
    return compared(
        name,
        asked,
        f"{found}{', fused' if fused and wanted is type(inner) else ''}",
        where,
        "leave optimizers= out of the Trainer, and create_optimizer as it is, for args.optim to act",
    )


def _rate(live: Live) -> Reading:
    args, groups = live.trainer.args, groups_of(live)
    rates = sorted({base_rate(group.values) for group in groups})
    asked, found = f"{float(args.learning_rate):g}", ", ".join(f"{rate:g}" for rate in rates)
    where = f"initial_lr of {len(groups)} groups of the optimizer"
    fix = "an optimizer block of the DeepSpeed file, or an optimizer of one's own, brings its own rate: make it equal"
    if len(rates) > 1 and float(args.learning_rate) in rates:
        return stated("args.learning_rate", found, f"groups with rates of their own; {where}", asked)
    return compared("args.learning_rate", asked, found, where, fix)


def _schedule(live: Live) -> Reading:
    """The scheduler that steps, at a few steps of the whole run, against the one that the arguments make."""
    args, scheduler = live.trainer.args, scheduler_of(live)
    lever, name = "args.lr_scheduler_type", str(args.lr_scheduler_type.value)
    total = int(args.max_steps)
    warmup = int(args.get_warmup_steps(total))
    own = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        wanted: Any = get_scheduler(name, own, warmup, total, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except Exception as error:  # a scheduler that needs more than a number of steps
        return stated(lever, type(scheduler).__name__, f"{name} cannot be made apart from its run: {error}"[:200], name)
    theirs, mine = getattr(scheduler, "lr_lambdas", None), getattr(wanted, "lr_lambdas", None)
    where = f"{type(scheduler).__name__}, at steps {', '.join(map(str, probes(warmup, total)))} of {total}"
    if not theirs or not mine:
        same = type(scheduler) is type(wanted)
        return compared(lever, name, name if same else type(scheduler).__name__, where, "leave the scheduler block out")
    asked = [float(mine[0](step)) for step in probes(warmup, total)]
    found = [float(theirs[0](step)) for step in probes(warmup, total)]
    right = all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(asked, found, strict=True))
    shown = ", ".join(f"{value:.3f}" for value in found)
    return Reading(
        lever,
        f"{name}, {warmup} steps of warm-up: {', '.join(f'{value:.3f}' for value in asked)}",
        shown,
        right,
        where,
        "a scheduler block of the DeepSpeed file, or optimizers= of the Trainer, replaces the arguments' scheduler",
    )


def _batch(live: Live) -> Iterator[Reading]:
    args, engine = live.trainer.args, engine_of_deepspeed(live)
    micro, steps, clip = int(live.trainer._train_batch_size), int(args.gradient_accumulation_steps), args.max_grad_norm
    if engine is not None:
        where = "DeepSpeed's engine"
        micro, steps = int(engine.train_micro_batch_size_per_gpu()), int(engine.gradient_accumulation_steps())
        clip = float(engine.gradient_clipping())
    else:
        where = "the trainer"
    fix = "let the DeepSpeed file say auto, so that the arguments decide"
    asked = int(args.per_device_train_batch_size) * max(1, int(args.n_gpu))
    yield compared("args.per_device_train_batch_size", str(asked), str(micro), where, fix)
    yield compared(
        "args.gradient_accumulation_steps", str(int(args.gradient_accumulation_steps)), str(steps), where, fix
    )
    yield compared("args.max_grad_norm", f"{float(args.max_grad_norm or 0):g}", f"{float(clip or 0):g}", where, fix)
    limit = getattr(args, "max_length", None)
    if isinstance(limit, int) and live.batches:
        longest = max(int(batch["input_ids"].shape[1]) for batch in live.batches)
        fix = "the collator or the data set lets longer samples through: cut them where they are tokenised"
        found = f"{longest} tokens"
        yield Reading("args.max_length", f"at most {limit} tokens", found, longest <= limit, "the worst batch", fix)


# ---- adapters and quantised modules -------------------------------------------------------------------------------


def _lora(live: Live) -> Iterator[Reading]:
    """The live adapters against the PeftConfig that made them."""
    layers = adapted_layers(live)
    configs = getattr(live.model, "peft_config", None)
    wanted = getattr(live.trainer.args, "peft_config", None) or getattr(live.trainer, "peft_config", None)
    if not isinstance(configs, Mapping):
        if wanted is not None:
            fix = "get_peft_model(model, peft_config) before the Trainer, or the trainer's own peft_config="
            yield Reading("peft_config", type(wanted).__name__, "no adapter", False, "the live model has none", fix)
        return
    for name, config in configs.items():
        if getattr(config, "target_modules", None) is None or not hasattr(config, "r"):
            yield stated(f"peft {name}", type(config).__name__, "no LoRA: its modules are not compared")
            continue
        yield _targets(live, config, layers)
        yield _numbers(config, name, layers)
        yield _beside(live, config)


def _targets(live: Live, config: Any, layers: Mapping[str, LoraLayer]) -> Reading:
    targets = config.target_modules
    by_part = Counter(live.part_of(f"{name}.weight") for name in layers)
    found = f"{len(layers)} modules" + (
        f" ({', '.join(f'{n} in {p}' for p, n in sorted(by_part.items()))})" if layers else ""
    )
    fix = "name the modules as the model has them: print(model) shows their names"
    if isinstance(targets, str):
        missed = [] if any(re.fullmatch(targets, name) for name in layers) or targets == "all-linear" else [targets]
        return Reading(
            "peft: target_modules", targets, found, bool(layers) and not missed, "adapter layers of PEFT", fix
        )
    missed = sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in layers))
    return Reading(
        "peft: target_modules",
        ", ".join(sorted(targets)) if len(targets) <= 8 else f"{len(targets)} names",
        found + (f"; {', '.join(missed)} matched nothing" if missed else ""),
        bool(layers) and not missed,
        f"{len(layers)} adapter layers of PEFT; PEFT itself complains only when no name matches at all",
        fix,
    )


def _numbers(config: Any, name: str, layers: Mapping[str, LoraLayer]) -> Reading:
    rooted = bool(getattr(config, "use_rslora", False))
    patterns = bool(getattr(config, "rank_pattern", None) or getattr(config, "alpha_pattern", None))
    own = [layer for layer in layers.values() if name in layer.r]
    ranks, scales = {int(layer.r[name]) for layer in own}, {round(float(layer.scaling[name]), 9) for layer in own}
    scale = round(config.lora_alpha / (math.sqrt(config.r) if rooted else config.r), 9)
    off = sum(bool(layer.disable_adapters or layer.merged) for layer in own)
    found = f"r {_all(ranks)}, scale {_all(scales)}" + (f"; {off} merged or off" if off else "")
    where = f"r and scaling of {len(own)} adapter layers"
    if patterns and not off:
        return stated("peft: r, lora_alpha", found, f"{where}; the config has patterns of its own")
    fix = "merged or disabled adapters learn nothing: enable them, and make the model anew from its config"
    return compared("peft: r, lora_alpha", f"r {config.r}, scale {scale:g}", found, where, fix)


def _beside(live: Live, config: Any) -> Reading:
    """What learns beside adapters and `modules_to_save` is there by accident, or was released after PEFT froze it."""
    saved = tuple(getattr(config, "modules_to_save", None) or ())
    marks = ("lora_", ".modules_to_save.")
    strange = [n for n, p in live.model.named_parameters() if p.requires_grad and not any(mark in n for mark in marks)]
    size = sum(unpacked_numel(live.model.get_parameter(name)) for name in strange)
    return Reading(
        "peft: what learns",
        "adapters" + (f" and {', '.join(saved)}" if saved else ""),
        "adapters" + (f" and {', '.join(saved)}" if saved else "")
        if not strange
        else f"{len(strange)} tensors of the base model too ({strange[0]}, {size:,} elements in all)",
        not strange,
        "requires_grad of every parameter",
        "do not release base weights after get_peft_model; modules_to_save names what is to learn whole",
    )


def _all(values: set[Any]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values)) or "none"


def _quantised(live: Live) -> Iterator[Reading]:
    """BitsAndBytesConfig of the model against the classes of its modules."""
    config = getattr(getattr(live.model, "config", None), "quantization_config", None)
    if config is None:
        return
    four = bool(getattr(config, "load_in_4bit", False))
    kind = FOUR_BIT if four else EIGHT_BIT if bool(getattr(config, "load_in_8bit", False)) else None
    if kind is None:
        yield stated(
            "quantization_config", type(config).__name__, "no setting of bitsandbytes: its modules are not read"
        )
        return
    found = Counter(type(m).__name__ for m in live.model.modules() if type(m).__name__ in (FOUR_BIT, EIGHT_BIT))
    text = ", ".join(f"{count} {name}" for name, count in sorted(found.items())) or "no quantised module"
    yield Reading(
        "quantization_config",
        f"{'4' if four else '8'} bit",
        text,
        set(found) == {kind},
        f"classes of modules; {type(config).__name__} of the model's config",
        "give the BitsAndBytesConfig to from_pretrained(quantization_config=...): later it does nothing",
    )


# ---- after steps --------------------------------------------------------------------------------------------------


def _checkpointing(live: Live, seen: Seen) -> Iterator[Reading]:
    args = live.trainer.args
    asked = bool(args.activation_checkpointing)
    every = int((args.activation_checkpointing_kwargs or {}).get("every_n_layers", 1))
    blocks = blocks_by_part(live)
    if asked and not blocks:
        fix = "the model's layers are no GradientCheckpointingLayer of transformers: checkpoint them by hand"
        yield Reading("args.gradient_checkpointing", "on", "no layer can", False, "classes of the model's modules", fix)
    for part, members in blocks.items():
        graph = [name for name, _ in members if name in seen.graph]
        twice = [n for n in graph if any(again == n or again.startswith(f"{n}.") for again in seen.again)]
        lever = f"args.gradient_checkpointing ({part})"
        found = f"{len(twice)} of {len(graph)} blocks with a graph computed twice"
        where = f"calls of each block in {seen.forwards} forwards and their backwards"
        if not asked or not graph:
            said = "not asked by the arguments" if not asked else "nothing in it learns"
            yield stated(lever, found, f"{said}; {where}")
            continue
        fix = (
            "checkpointing acts in training mode on a model that supports it: model.train(), and let nothing call "
            "gradient_checkpointing_disable; with frozen embeddings and use_reentrant=True nothing is checkpointed"
        )
        yield Reading(lever, "on", found, len(twice) * every >= len(graph) > 0 and bool(twice), where, fix)


def _autocast(live: Live, seen: Seen) -> Reading:
    args = live.trainer.args
    found = ", ".join(sorted({dtype for _, dtype in seen.autocast})) or "off"
    computes = Counter[str]()
    for (_, dtype), calls in seen.computes.items():
        computes[dtype] += calls
    where = ", ".join(f"{calls} products with weights in {dtype}" for dtype, calls in sorted(computes.items()))
    wanted = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    name = "args.bf16" if args.bf16 or not args.fp16 else "args.fp16"
    if wanted is None:
        return stated("args.bf16, args.fp16", f"autocast {found}", f"neither is asked; {where}")
    fix = f"an engine file or ACCELERATE_MIXED_PRECISION must not say otherwise than {name}"
    return Reading(name, f"products in {wanted}", f"autocast {found}, {where}", wanted in computes, where, fix)


def _attention(live: Live, seen: Seen) -> Iterator[Reading]:
    config: Any = getattr(live.model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    wanted = ATTENTION.get(str(getattr(text, "_attn_implementation", None)))
    ran, kernels = kinds_of("language", seen)
    if wanted is None or not ran:
        return
    yield compared(
        "attn_implementation (language)",
        wanted,
        " and ".join(ran),
        ", ".join(kernels),
        "attn_implementation is given to from_pretrained; output_attentions=True turns it into eager",
    )
