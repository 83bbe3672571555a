"""A user's own DeepSpeed configuration against its keys and against the recipe: every finding at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rapidfuzz import process

from memfit.catalog.deepspeed_keys import DeepSpeedKeys, shipped_keys
from memfit.specs.deepspeed_file import Finding, Kind
from memfit.specs.recipe import Recipe
from memfit.strategies.deepspeed_config import CPU_ADAM
from memfit.strategies.user_deepspeed import (
    AUTO,
    PRICED,
    ZERO,
    Config,
    batches_of,
    gradients_of,
    is_count,
    meant_precisions,
    offload_of,
    precisions_of,
    section_of,
    stage_of,
    value_of,
)

# deepspeed.runtime.lr_schedules: what the rate does once it is warm.
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
EPSILON = 1e-8  # transformers.TrainingArguments.adam_epsilon, which memfit leaves as it is
_BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# Values that transformers puts where the file says "auto".
# Source: transformers.integrations.deepspeed:HfTrainerDeepSpeedConfig.trainer_config_process.
FILLED = {*_BATCHES, "gradient_clipping"}
# Keys of the ZeRO section that move no byte of the ledger, whatever they are set to.
FREE = {
    "stage",
    "offload_optimizer",
    "offload_param",
    "allgather_bucket_size",
    "load_from_fp32_weights",
    "ignore_unused_parameters",
    "override_module_apply",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "elastic_checkpoint",
    "legacy_stage1",
    "save_muon_momentum_buffer_in_memory",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "compute_grad_norm",
    "cpu_offload_use_pin_memory",
}
# Features beside ZeRO: (section, key, value that switches it off).
OTHERS = (
    ("torch_autocast", "enabled", False),
    ("hybrid_engine", "enabled", False),
    ("autotuning", "enabled", False),
    ("data_efficiency", "enabled", False),
    ("expert_parallel", "enabled", False),
    ("tensor_parallel", "autotp_size", 0),
    ("compile", "deepcompile", False),
)
NOT_RUN = ("weight_quantization", "sequence_parallel_size")
_ON_NVME = ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write", "fast_init")


@dataclass(frozen=True)
class Against:
    """What a configuration is held against. `recipe` None: the keys alone. `ranks`: processes of the run."""

    recipe: Recipe | None = None
    ranks: int | None = None
    keys: DeepSpeedKeys | None = None

    @property
    def known(self) -> DeepSpeedKeys:
        """The keys of the DeepSpeed in question."""
        return self.keys or shipped_keys()


def findings_of(config: Config, against: Against) -> tuple[Finding, ...]:
    """Everything there is to say of a configuration that `user_deepspeed.read` has put in one spelling."""
    shapeless = [*_shapes(config, against.known)]
    found = [*shapeless, *_keys(config, against.known), *_counts(config)]
    if not shapeless:
        found += [*_stage(config), *_offload(config), *_precision(config), *_unpriced(config, against.known)]
        found += [*_without_effect(config, against.known)]
        if against.recipe is not None:
            found += [*_against_recipe(config, against.recipe, against.ranks)]
        else:
            found += [*_sums(config, against.ranks)]
    return tuple(found)


def _error(key: str, problem: str, hint: str) -> Finding:
    return Finding("error", key, problem, hint)


def _no_effect(key: str, problem: str, hint: str = "leave it out") -> Finding:
    return Finding("no-effect", key, problem, hint)


# ── keys ──


def _shapes(config: Config, known: DeepSpeedKeys) -> Iterator[Finding]:
    """Sections that hold no keys: what they say cannot be read."""
    for path in filter(None, known.sections):
        above, _, key = path.rpartition(".")
        place = config
        for name in filter(None, above.split(".")):
            place = section_of(place, name)
        value = place.get(key)
        if value is not None and not isinstance(value, Mapping):
            yield _error(path, f"is a section, and holds {value!r}", f'"{key}": {{...}}')


def _keys(config: Config, known: DeepSpeedKeys) -> Iterator[Finding]:
    for key, value in config.items():
        if key in known.removed:
            yield _error(key, f"DeepSpeed {known.version} has it no more and refuses the file", "leave it out")
        elif key not in known.sections[""]:
            yield _unknown("", key, known)
        elif isinstance(value, Mapping):
            yield from _section_keys(key, value, known)
        elif value == AUTO and key not in FILLED and key not in known.sections:
            yield _error(key, '"auto" is filled in by nobody here', "give a value, or leave it out")


def _section_keys(path: str, section: Mapping[str, Any], known: DeepSpeedKeys) -> Iterator[Finding]:
    if path not in known.sections:
        return
    for key, value in section.items():
        inner = f"{path}.{key}"
        if inner in known.removed:
            yield _error(inner, f"DeepSpeed {known.version} has it no more and refuses the file", "leave it out")
        elif key not in known.sections[path]:
            yield _unknown(path, key, known)
        elif isinstance(value, Mapping):
            yield from _section_keys(inner, value, known)
        elif isinstance(known.sections[path][key], bool) and not (isinstance(value, bool) or value in (None, AUTO)):
            # DeepSpeed reads "yes" and 1 as true; what is priced would be false.
            yield _error(inner, f"{value!r} is not true or false", "true or false, without quotes")


def _counts(config: Config) -> Iterator[Finding]:
    for key in _BATCHES:
        value = config.get(key)
        if value not in (None, AUTO) and not is_count(value):
            yield _error(key, f"{value!r} is no whole number above 0", '"auto", or a number without quotes')


def _unknown(path: str, key: str, known: DeepSpeedKeys) -> Finding:
    """Refused by DeepSpeed where it checks the section, ignored without a word elsewhere."""
    kind: Kind = "error" if path in known.closed else "no-effect"
    whole, where = f"{path}.{key}" if path else key, path or "the top level"
    places = [place for place in known.places(key) if place != path]
    does = "refuses it" if kind == "error" else "never reads it"
    if places:
        near = ZERO if ZERO in places else places[0]
        belongs = f"it belongs into {near}" if near else "it belongs to the top level"
        return Finding(kind, whole, f"is on the wrong level: at {where} DeepSpeed {does}", belongs)
    close = process.extractOne(key, list(known.sections[path]), score_cutoff=70)
    hint = f"did you mean {close[0]}?" if close else "leave it out"
    return Finding(kind, whole, f"is no key of DeepSpeed {known.version}, which {does}", hint)


# ── the file by itself ──


def _stage(config: Config) -> Iterator[Finding]:
    stage = stage_of(config)
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        problem = f"{stage!r}: nothing is split" if stage in (0, None) else f"{stage!r} is no stage of ZeRO"
        yield _error(f"{ZERO}.stage", problem, "1, 2 or 3; for none, levers.parallel: ddp and no DeepSpeed file")


def _offload(config: Config) -> Iterator[Finding]:
    section, stage = section_of(config, ZERO), stage_of(config)
    for name in ("offload_optimizer", "offload_param"):
        block, path = section.get(name), f"{ZERO}.{name}"
        if not isinstance(block, Mapping):
            continue
        device = value_of(config, path, "device")
        if device not in ("none", "cpu", "nvme"):
            yield _error(f"{path}.device", f"{device!r} is no place", "cpu, nvme or none")
        elif device == "none":
            yield _no_effect(path, "device none moves nothing to host memory", 'device: "cpu", or leave it out')
        elif name == "offload_param" and stage != 3:
            yield _no_effect(path, f"stage {stage} keeps whole parameters on every GPU", "stage: 3, or leave it out")
        elif device == "cpu":
            written = [key for key in _ON_NVME if key in block]
            yield from (_no_effect(f"{path}.{key}", "acts with device nvme only") for key in written)
    if value_of(config, f"{ZERO}.offload_optimizer", "ratio") != 1 and isinstance(
        section.get("offload_optimizer"), Mapping
    ):
        yield _error(f"{ZERO}.offload_optimizer.ratio", "a share of the states has no price here", "ratio: 1.0")
    if value_of(config, f"{ZERO}.offload_optimizer", "super_offload"):
        yield _error(f"{ZERO}.offload_optimizer.super_offload", "has no price here", "leave it out")
    moved = offload_of(config)
    if moved["offload"] == "params":
        yield _error(
            f"{ZERO}.offload_param", "parameters alone have no price here", 'offload_optimizer: {"device": "cpu"} too'
        )
    if " and " in moved.get("offload_to", ""):
        yield _error(f"{ZERO}.offload_param.device", "two places have no price here", "one device for both")


def _precision(config: Config) -> Iterator[Finding]:
    bf16, fp16 = section_of(config, "bf16"), section_of(config, "fp16")
    if bf16.get("enabled") is True and fp16.get("enabled") is True:
        yield _error("fp16.enabled", "fp16 and bf16 are both on, and DeepSpeed takes one", "fp16: {enabled: false}")
    masters, states = (bf16.get(key) is True for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"))
    if masters != states:
        wrong = "bf16_optimizer_states" if states else "bf16_master_weights_and_grads"
        yield _error(f"bf16.{wrong}", "one without the other has no price here", "both true, or neither")
    if fp16.get("fp16_master_weights_and_grads") is True:
        yield _error("fp16.fp16_master_weights_and_grads", "has no price here", "leave it out")


def _unpriced(config: Config, known: DeepSpeedKeys) -> Iterator[Finding]:
    """What would move bytes that no term counts: the forecast would be of another run."""
    defaults = known.sections[ZERO]
    for key, value in section_of(config, ZERO).items():
        usual = defaults.get(key)
        if key not in defaults or key in PRICED or key in FREE or value in (None, AUTO, usual):
            continue
        yield _error(
            f"{ZERO}.{key}", f"{value!r} has no price here", f"{usual!r}" if usual is not None else "leave it out"
        )
    for key in PRICED:
        value = section_of(config, ZERO).get(key)
        wrong = isinstance(value, bool) != (key == "overlap_comm") or not isinstance(value, int)
        if value is not None and value != AUTO and (wrong or value < 0):
            wanted = "true or false" if key == "overlap_comm" else "a whole number"
            yield _error(f"{ZERO}.{key}", f"{value!r} is not {wanted}", f"{defaults[key]}")
    for name, key, off in OTHERS:
        if value_of(config, name, key) not in (None, off, 1 if key == "autotp_size" else off):
            yield _error(name, "is neither forecast nor run by memfit", f"{key}: {off}")
    for name in NOT_RUN:
        if config.get(name) not in (None, 1):
            yield _error(name, "is neither forecast nor run by memfit", "leave it out")
    if str(config.get("gradient_allreduce_op", "mean")).lower() != "mean":
        yield _error("gradient_allreduce_op", "a sum over ranks changes what is learned", "mean")


def _without_effect(config: Config, known: DeepSpeedKeys) -> Iterator[Finding]:
    section, stage = section_of(config, ZERO), stage_of(config)
    if "allgather_bucket_size" in section:
        why = "stage 3 gathers module by module" if stage == 3 else "torch gathers a whole group in place"
        yield _no_effect(f"{ZERO}.allgather_bucket_size", f"{why} and never reads it")
    if stage != 3:
        idle = [key for key in section if key.startswith("stage3_") or key == "sub_group_size"]
        yield from (_no_effect(f"{ZERO}.{key}", f"acts under stage 3, and this is stage {stage}") for key in idle)
    elif section.get("stage3_gather_16bit_weights_on_model_save"):
        key = f"{ZERO}.stage3_gather_16bit_weights_on_model_save"
        yield _no_effect(key, "memfit gathers the weights itself when it saves, tensor by tensor")
    if "cpu_offload_use_pin_memory" in section:
        yield _no_effect(
            f"{ZERO}.cpu_offload_use_pin_memory", "DeepSpeed sets nothing by it", "pin_memory in the block"
        )
    for key in ("activation_checkpointing", "pipeline"):
        if key in config:
            yield _no_effect(key, "acts on models written for DeepSpeed's own functions", "levers.checkpointing")
    moved = offload_of(config)
    if "aio" in config and moved.get("offload_to") != "nvme":
        yield _no_effect("aio", "acts with an offload to nvme only")
    if config.get("zero_force_ds_cpu_optimizer") is True and moved["offload"] == "none":
        yield _no_effect("zero_force_ds_cpu_optimizer", "nothing is offloaded")
    if config.get("zero_allow_untested_optimizer") is False:
        yield _no_effect("zero_allow_untested_optimizer", "memfit sets it: DeepSpeed would refuse torch's fused AdamW")


def _sums(config: Config, ranks: int | None) -> Iterator[Finding]:
    """train_batch_size = micro batch x accumulation x ranks, as far as the file says them all."""
    batch, micro, steps = (config.get(key) for key in _BATCHES)
    if ranks is None or not (is_count(batch) and is_count(micro) and is_count(steps)):
        return
    if batch != micro * steps * ranks:  # type: ignore[operator]
        yield _error(
            "train_batch_size", f"{batch} is not {micro} x {steps} accumulated x {ranks} ranks", 'leave one "auto"'
        )


# ── the file against the recipe ──


def _against_recipe(config: Config, recipe: Recipe, ranks: int | None) -> Iterator[Finding]:
    levers = recipe.levers
    if "zero" in recipe.engine:
        yield _error(ZERO, "the recipe's engine.zero says such values too", "keep one of engine.zero and the file")
    parallel = f"zero{stage_of(config)}"
    if levers.parallel not in (AUTO, parallel):
        yield _error(f"{ZERO}.stage", f"{parallel}, the recipe says {levers.parallel}", "levers.parallel: auto")
    moved = offload_of(config)
    for name, value in moved.items():
        own = getattr(levers, name)
        if own not in (AUTO, value) and (name == "offload" or moved["offload"] != "none"):
            yield _error(f"{ZERO}.offload_optimizer", f"{name} {value}, the recipe says {own}", f"levers.{name}: auto")
    allowed = precisions_of(config)
    if allowed and levers.precision not in (AUTO, *allowed):
        said = f"they mean {' or '.join(allowed)}, the recipe says {levers.precision}"
        yield _error("bf16, fp16", said, "levers.precision: auto")
    yield from _batches(config, recipe, ranks)
    clip = config.get("gradient_clipping")
    if clip is None:
        yield Finding("note", "gradient_clipping", f"not in the file; the recipe's {recipe.schedule.clip} is used")
    elif clip != AUTO and clip != recipe.schedule.clip:
        yield _error("gradient_clipping", f"{clip}, the recipe says {recipe.schedule.clip}", f"schedule.clip: {clip}")
    yield from _reduced_in(config, recipe)
    yield from _optimizer(config, recipe)
    yield from _schedule(config, recipe)


def _batches(config: Config, recipe: Recipe, ranks: int | None) -> Iterator[Finding]:
    if ranks is None:
        return
    yield from _sums(config, ranks)
    for key, value in batches_of(config, ranks, recipe.levers.micro_batch).items():
        own = recipe.batch if key == "batch" else recipe.levers.micro_batch
        if own not in (AUTO, value):
            name = "train_micro_batch_size_per_gpu"
            if key == "batch":
                name = "train_batch_size" if is_count(config.get("train_batch_size")) else "gradient_accumulation_steps"
            yield _error(
                name, f"gives {key} {value} on {ranks} ranks, the recipe says {own}", f'"auto", or {key}: {value}'
            )


def _reduced_in(config: Config, recipe: Recipe) -> Iterator[Finding]:
    """The dtype in which gradients are added up and travel: that of a precision that file and recipe may mean."""
    meant = meant_precisions(config, recipe.levers.precision)
    fitting = sorted({dtype for one in meant if (dtype := gradients_of(one)) is not None})
    summed = section_of(config, "data_types").get("grad_accum_dtype")
    sent = config.get("communication_data_type")
    for key, value in (("data_types.grad_accum_dtype", summed), ("communication_data_type", sent)):
        if value not in (None, AUTO) and fitting and value not in fitting:
            yield _error(key, f"{value} under {' or '.join(meant)} has no price here", " or ".join(fitting))


def _optimizer(config: Config, recipe: Recipe) -> Iterator[Finding]:
    if "optimizer" not in config:
        return
    block, own = section_of(config, "optimizer"), recipe.levers.optimizer
    kind = str(block.get("type", ""))
    if kind.lower() not in ("adam", "adamw") or own not in (AUTO, *CPU_ADAM):
        said = "adamw" if own == AUTO else own
        yield _error("optimizer.type", f"{kind or 'none'}, the recipe says {said}", "leave the block out")
        return
    params, schedule = section_of(block, "params"), recipe.schedule
    wanted: dict[str, tuple[Any, str]] = {
        "lr": (schedule.learning_rate, "schedule.learning_rate"),
        "betas": (list(schedule.betas), "schedule.betas"),
        "weight_decay": (schedule.weight_decay, "schedule.weight_decay"),
        "eps": (EPSILON, "eps"),
        "adam_w_mode": (True, "adam_w_mode"),
    }
    wrong = [name for name, (value, _) in wanted.items() if params.get(name, AUTO) not in (AUTO, value)]
    for name in wrong:
        value, key = wanted[name]
        yield _error(
            f"optimizer.params.{name}", f"{params[name]}, the recipe says {value}", f'"auto", or {key}: {params[name]}'
        )
    for name in params:
        if name not in wanted:
            yield _no_effect(f"optimizer.params.{name}", "memfit's own AdamW runs")
    if not wrong:
        yield _no_effect("optimizer", "memfit's own AdamW runs with the same values, a rate for every part")


def _schedule(config: Config, recipe: Recipe) -> Iterator[Finding]:
    if "scheduler" not in config:
        return
    block, schedule = section_of(config, "scheduler"), recipe.schedule
    kind, params = str(block.get("type", "")), section_of(block, "params")
    if SCHEDULES.get(kind) != schedule.kind:
        does, hint = "has no counterpart", "leave the block out"
        if kind in SCHEDULES:
            does, hint = f"is {SCHEDULES[kind]} once it is warm", f"{hint}, or schedule.kind: {SCHEDULES[kind]}"
        yield _error("scheduler.type", f"{kind or 'none'} {does}, the recipe says {schedule.kind}", hint)
        return
    steps = schedule.steps
    wanted: dict[str, Any] = {
        "warmup_max_lr": schedule.learning_rate,
        "warmup_min_lr": 0,
        "total_num_steps": steps,
        "warmup_num_steps": round(schedule.warmup * steps) if steps else None,
    }
    wrong = [name for name, value in wanted.items() if params.get(name, AUTO) not in (AUTO, value)]
    for name in wrong:
        said = f"the recipe says {wanted[name]}" if wanted[name] is not None else "the recipe counts epochs"
        yield _error(f"scheduler.params.{name}", f"{params[name]}, {said}", '"auto", or leave the block out')
    if not wrong:
        # deepspeed.runtime.lr_schedules:WarmupLR: warmup_type is log unless the file says linear.
        shape = "" if params.get("warmup_type") == "linear" else "; its warm-up is linear, not logarithmic"
        yield _no_effect("scheduler", f"the recipe's own {schedule.kind} schedule runs{shape}")
