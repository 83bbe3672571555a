"""A user's own DeepSpeed configuration: what it fixes, what it is priced with, and what runs.

`read` gives one spelling of it, which everything else here takes. "auto" means what transformers makes of it
(transformers.integrations.deepspeed:HfTrainerDeepSpeedConfig): the recipe's own value for batches, clipping, precision
and the optimizer's numbers, a number of the hidden size for three of ZeRO's; anywhere else in a section that DeepSpeed
checks, its own default (deepspeed.runtime.config_utils:DeepSpeedConfigModel drops "auto").
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memfit.catalog.deepspeed_keys import DeepSpeedKeys, shipped_keys
from memfit.specs.deepspeed_file import Finding

AUTO = "auto"
ZERO = "zero_optimization"
Config = Mapping[str, Any]

# Numbers and switches of the ZeRO section that the ledger has terms for (memfit.strategies.zero:VALUES).
PRICED = (
    "reduce_bucket_size",
    "overlap_comm",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
)
# Blocks that memfit runs itself, with the values that the recipe and the file agree on.
REPLACED = ("optimizer", "scheduler")
_DEVICES = {"none": "none", "cpu": "host", "nvme": "nvme"}


@dataclass(frozen=True)
class UserDeepSpeed:
    """A configuration in one spelling, and what had to be said on the way."""

    config: dict[str, Any]
    findings: tuple[Finding, ...]


def read(content: Config, keys: DeepSpeedKeys | None = None) -> UserDeepSpeed:
    """One spelling for what DeepSpeed takes in several: aliases, deprecated keys, 5e8 as a whole number."""
    known, findings = keys or shipped_keys(), []
    config: dict[str, Any] = {str(key): _whole(copy.deepcopy(value)) for key, value in content.items()}
    if "bfloat16" in config and "bf16" not in config:
        config["bf16"] = config.pop("bfloat16")
        findings.append(Finding("note", "bfloat16", "read as bf16"))
    section = config.get(ZERO)
    if not isinstance(section, dict):
        return UserDeepSpeed(config, tuple(findings))
    for name in list(section):
        alias = known.aliases.get(f"{ZERO}.{name}")
        if alias is not None and alias not in section:
            section[alias] = section.pop(name)
            findings.append(Finding("note", f"{ZERO}.{name}", f"read as {alias}"))
    # Source: deepspeed.runtime.zero.config:DeepSpeedZeroConfig, fields marked deprecated.
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if isinstance(section.get(old), bool) and new not in section:
            if section.pop(old):
                section[new] = {"device": "cpu"}
            findings.append(Finding("note", f"{ZERO}.{old}", f"deprecated; read as {new}"))
    return UserDeepSpeed(config, tuple(findings))


def section_of(config: Config, name: str) -> Config:
    """A section, empty where the file has none."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def value_of(config: Config, section: str, key: str, keys: DeepSpeedKeys | None = None) -> Any:
    """A value in force: the file's, or DeepSpeed's default where it says nothing, null or "auto"."""
    place: Config = config
    for name in section.split("."):
        place = section_of(place, name)
    value = place.get(key)
    if value is None or value == AUTO:
        return (keys or shipped_keys()).sections[section].get(key)
    return value


def stage_of(config: Config) -> Any:
    """ZeRO's stage; 0 where nothing is said."""
    return value_of(config, ZERO, "stage")


def offload_of(config: Config) -> dict[str, Any]:
    """The offload levers that the file stands for: offload, offload_to, pin_memory.

    Offloaded parameters without offloaded states are told apart by `offload: params`, which no recipe has.
    """
    section = section_of(config, ZERO)
    devices, pins = {}, {}
    for name in ("offload_optimizer", "offload_param"):
        if isinstance(section.get(name), Mapping) and (name == "offload_optimizer" or stage_of(config) == 3):
            found = value_of(config, f"{ZERO}.{name}", "device")
            devices[name] = _DEVICES.get(str(found), str(found))
            pins[name] = bool(value_of(config, f"{ZERO}.{name}", "pin_memory"))
    moved = {name: device for name, device in devices.items() if device != "none"}
    if not moved:
        return {"offload": "none"}
    what = {
        ("offload_optimizer",): "optimizer",
        ("offload_param",): "params",
        ("offload_optimizer", "offload_param"): "params+optimizer",
    }[tuple(moved)]
    return {
        "offload": what,
        "offload_to": " and ".join(sorted(set(moved.values()))),
        "pin_memory": all(pins[name] for name in moved),
    }


def precisions_of(config: Config) -> tuple[str, ...]:
    """The values of levers.precision that the file allows; empty where it names none."""
    bf16, fp16 = section_of(config, "bf16"), section_of(config, "fp16")
    if "enabled" not in bf16 and "enabled" not in fp16:
        return ()
    pure = bf16.get("bf16_master_weights_and_grads") is True
    wide = "pure-bf16" if pure else "bf16-mixed"
    allowed = []
    if bf16.get("enabled") in (True, AUTO):
        allowed.append(wide)
    if fp16.get("enabled") in (True, AUTO):
        allowed.append("fp16-mixed")
    if True not in (bf16.get("enabled"), fp16.get("enabled")):
        allowed.append("fp32")
    elif AUTO in (bf16.get("enabled"), fp16.get("enabled")):
        allowed = [wide if bf16.get("enabled") is True else "fp16-mixed"]
    return tuple(allowed)


def meant_precisions(config: Config, said: str) -> tuple[str, ...]:
    """What file and recipe may mean together; `said` is the recipe's, which may leave it open."""
    allowed = precisions_of(config) or ("fp32",)
    return allowed if len(allowed) == 1 or said == AUTO else (said,)


def gradients_of(precision: str) -> str | None:
    """DeepSpeed's name of the dtype that gradients have under a precision; None for one that no ZeRO has."""
    return {"fp32": "fp32", "fp16-mixed": "fp16"}.get(precision, "bf16" if "bf16" in precision else None)


def batches_of(config: Config, ranks: int, micro_batch: int | str) -> dict[str, int]:
    """levers.micro_batch and batch that the file fixes; `micro_batch` is the recipe's, "auto" counts as 1."""
    found: dict[str, int] = {}
    micro, steps = config.get("train_micro_batch_size_per_gpu"), config.get("gradient_accumulation_steps")
    if is_count(micro):
        found["levers.micro_batch"] = int(micro)  # type: ignore[arg-type]
    if is_count(config.get("train_batch_size")):
        found["batch"] = int(config["train_batch_size"])
    elif is_count(steps):
        own = found.get("levers.micro_batch", micro_batch if isinstance(micro_batch, int) else 1)
        found["batch"] = int(steps) * own * ranks  # type: ignore[arg-type]
    return found


def zero_numbers(config: Config) -> dict[str, Any]:
    """The priced values of the ZeRO section, as `engine: {zero: ...}` would say them."""
    section = section_of(config, ZERO)
    values = {key: section[key] for key in PRICED if section.get(key) is not None}
    # transformers fills in these only, two of them under stage 3 only; DeepSpeed takes its default for the others.
    filled = ("reduce_bucket_size", *(_AUTO_STAGE_3 if stage_of(config) == 3 else ()))
    values = {key: value for key, value in values.items() if value != AUTO or key in filled}
    # deepspeed.runtime.zero.config:DeepSpeedZeroConfig.overlap_comm_valid
    values.setdefault("overlap_comm", stage_of(config) == 3)
    return values


_AUTO_STAGE_3 = ("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


def merged(own: Config, config: Config, keys: DeepSpeedKeys | None = None) -> dict[str, Any]:
    """What runs: memfit's configuration of the plan, which agrees with the file, under the file's own values.

    Unknown keys, replaced blocks, offload blocks that move nothing and "auto" are left out.
    """
    known = (keys or shipped_keys()).sections
    config = {name: value for name, value in config.items() if name in known[""] and name not in REPLACED}
    section = {
        name: value
        for name, value in section_of(config, ZERO).items()
        if name in known[ZERO] and (name in own[ZERO] or not name.startswith(("offload_", "cpu_offload")))
    }
    taken = _overlaid(own, {**config, ZERO: section})
    taken["zero_allow_untested_optimizer"] = own["zero_allow_untested_optimizer"]
    if "offload_optimizer" not in own[ZERO]:
        taken["zero_force_ds_cpu_optimizer"] = False
    gathers = "stage3_gather_16bit_weights_on_model_save"
    return taken | {ZERO: {k: own[ZERO].get(k, False) if k == gathers else v for k, v in taken[ZERO].items()}}


def _overlaid(own: Config, other: Config) -> dict[str, Any]:
    """`own` with what `other` says outright, section by section."""
    taken = dict(own)
    for name, value in other.items():
        if value is None or value == AUTO:
            continue
        below = taken.get(name)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        taken[name] = _overlaid(below, value) if both and isinstance(below, Mapping) else value
    return taken


def is_count(value: Any) -> bool:
    """Whether a value is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _whole(value: Any) -> Any:
    """5e8 is a float in JSON and a number of elements to whoever writes it."""
    if isinstance(value, Mapping):
        return {str(key): _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value
