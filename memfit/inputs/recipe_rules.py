"""What a recipe's types alone cannot say: ranges, and values that exclude each other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

from memfit.specs.recipe import Recipe, WorkloadKeys
from memfit.units import parse_bytes

_LAST_N = re.compile(r"^last-([1-9][0-9]*)$")
_EVERY_N = re.compile(r"^every-([1-9][0-9]*)$")
_PISSA_N = re.compile(r"^pissa_niter_[1-9][0-9]*$")
LORA_INITS = ("default", "gaussian", "pissa", "olora", "orthogonal")
PART_MODES = ("frozen", "lora", "full")
CHECKPOINTING = ("none", "full", "selective")
CHECKPOINTED_PARTS = ("vision", "connector", "language")


def value_mistakes(recipe: Recipe) -> list[str]:
    """Every wrong value, one line each, in the order of the file."""
    return [line for rule in _RULES for line in rule(recipe)]


def _numbers(recipe: Recipe) -> Iterator[str]:
    positive = {
        "lora.rank": recipe.lora.rank,
        "lora.alpha": recipe.lora.alpha,
        "levers.micro_batch": recipe.levers.micro_batch,
        "image.max_slices": recipe.image.max_slices,
        "image.max_pixels": recipe.image.max_pixels,
        "image.max_tokens": recipe.image.max_tokens,
        "max_length": recipe.max_length,
        "batch": recipe.batch,
        "schedule.epochs": recipe.schedule.epochs,
        "schedule.steps": recipe.schedule.steps,
        "data.limit": recipe.data.limit,
        "loader.prefetch": recipe.loader.prefetch,
        "generate.max_new_tokens": recipe.generate.max_new_tokens,
        "run.save_every": recipe.run.save_every,
        "run.keep": recipe.run.keep,
        "run.eval_every": recipe.run.eval_every,
    }
    for key, value in positive.items():
        if isinstance(value, int | float) and not (0 < value < math.inf):
            yield f"{key}: {value} must be above 0"
    shares = {"data.max_broken": recipe.data.max_broken, "lora.dropout": recipe.lora.dropout}
    shares |= {"schedule.warmup": recipe.schedule.warmup}
    shares |= {f"schedule.betas.{index}": beta for index, beta in enumerate(recipe.schedule.betas)}
    for key, share in shares.items():
        if not 0 <= share < 1:
            yield f"{key}: {share} must be at least 0 and below 1"
    if isinstance(recipe.data.eval, float | int) and not 0 <= recipe.data.eval < 1:
        yield f"data.eval: {recipe.data.eval} must be a path, or a share of at least 0 and below 1"
    for key, value in (("clip", recipe.schedule.clip), ("weight_decay", recipe.schedule.weight_decay)):
        if not 0 <= value < math.inf:
            yield f"schedule.{key}: {value} must be at least 0"
    if isinstance(recipe.loader.workers, int) and recipe.loader.workers < 0:
        yield f"loader.workers: {recipe.loader.workers} must be at least 0"
    if not 0 <= recipe.seed < 2**32:
        yield f"seed: {recipe.seed} must be from 0 to 4294967295"


def _learning_rates(recipe: Recipe) -> Iterator[str]:
    rate = recipe.schedule.learning_rate
    rates = rate.items() if isinstance(rate, dict) else [("", rate)]
    for part, value in rates:
        key = f"schedule.learning_rate{'.' if part else ''}{part}"
        if not 0 <= float(value) < math.inf:  # type: ignore[arg-type]
            yield f"{key}: {value} must be at least 0"


def _lora_init(recipe: Recipe) -> Iterator[str]:
    """What `peft.LoraConfig(init_lora_weights)` does without a look at data or weights that are not there yet."""
    if recipe.lora.init not in LORA_INITS and not _PISSA_N.match(recipe.lora.init):
        allowed = f"{', '.join(LORA_INITS)} or pissa_niter_N (such as pissa_niter_4)"
        yield f"lora.init: {recipe.lora.init!r} is not allowed, expected {allowed}"


def _parts(recipe: Recipe) -> Iterator[str]:
    for part, mode in recipe.parts.items():
        if mode not in PART_MODES and not _LAST_N.match(mode):
            yield f"parts.{part}: {mode!r} is not allowed, expected frozen, lora, full or last-N (such as last-4)"


def _checkpointing(recipe: Recipe) -> Iterator[str]:
    chosen = recipe.levers.checkpointing
    pairs = chosen.items() if isinstance(chosen, dict) else [("", chosen)]
    for part, value in pairs:
        key = f"levers.checkpointing{'.' if part else ''}{part}"
        if part and part not in CHECKPOINTED_PARTS:
            yield f"{key}: unknown part; expected {', '.join(CHECKPOINTED_PARTS)}"
        elif value not in CHECKPOINTING and not _EVERY_N.match(str(value)) and (part or value != "auto"):
            yield f"{key}: {value!r} is not allowed, expected none, full, selective or every-N (such as every-2)"


def _one_image_knob(recipe: Recipe) -> Iterator[str]:
    knobs = {name: value for name, value in vars(recipe.image).items() if name != "downsample_mode"}
    pinned = [f"image.{name}" for name, value in knobs.items() if value != "auto"]
    if len(pinned) > 1:
        yield f"{' and '.join(pinned)}: one image budget at a time; keep one and leave the others auto"


def _workload(recipe: Recipe) -> Iterator[str]:
    keys = recipe.workload
    if not isinstance(keys, WorkloadKeys):
        return
    if keys.tokens is not None and keys.tokens <= 0:
        yield f"workload.tokens: {keys.tokens} must be above 0"
    if keys.images is not None and keys.images < 0:
        yield f"workload.images: {keys.images} must be at least 0"
    if keys.image_size is not None and not re.match(r"^[1-9][0-9]*x[1-9][0-9]*$", keys.image_size):
        yield f"workload.image_size: {keys.image_size!r} is not WIDTHxHEIGHT (such as 1344x1344)"


def _sizes(recipe: Recipe) -> Iterator[str]:
    if recipe.hardware == "auto":
        return
    for key in ("host_memory", "nvme"):
        value = getattr(recipe.hardware, key)
        if value is None:
            continue
        try:
            parse_bytes(value)
        except ValueError as error:
            yield f"hardware.{key}: {error}"


_RULES: tuple[Callable[[Recipe], Iterator[str]], ...] = (
    _numbers,
    _learning_rates,
    _lora_init,
    _parts,
    _checkpointing,
    _one_image_knob,
    _workload,
    _sizes,
)
