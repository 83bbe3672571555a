"""The recipe: what the user wants. Every lever is `auto` unless the user pins it.

Plain frozen dataclasses, so that nothing below needs pydantic; `memfit.inputs.recipe_file` reads YAML into them and
reports every mistake at once. The key names are a contract and the list is closed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Auto = Literal["auto"]
Method = Literal["full", "lora", "qlora"]
PartName = Literal["vision", "connector", "language", "head", "audio", "tts"]
Precision = Literal["fp32", "fp16-amp", "bf16-amp", "fp16-mixed", "bf16-mixed", "pure-bf16"]

# pydantic reads this off a dataclass; the string key keeps pydantic itself out of this floor.
_CLOSED: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the samples are. `eval` is a path or a share of the training rows, split by image hash."""

    __pydantic_config__ = _CLOSED
    train: str | None = None
    eval: str | float | None = 0.1
    image_root: str | None = None
    format: Literal["auto", "openbmb", "llava", "sharegpt", "openai", "swift"] = "auto"
    limit: int | None = None
    max_broken: float = 0.01


@dataclass(frozen=True, kw_only=True)
class WorkloadKeys:
    """The worst sample, when there is no data to read it from. `tokens` counts image tokens too."""

    __pydantic_config__ = _CLOSED
    tokens: int | None = None
    images: int | None = None
    image_size: str | None = None


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA settings; they act only inside parts set to `lora`."""

    __pydantic_config__ = _CLOSED
    rank: int = 64
    alpha: float = 64
    dropout: float = 0.05
    targets: Literal["auto", "all-linear"] | tuple[str, ...] = "auto"
    variant: Literal["lora", "rslora", "dora"] = "lora"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    init: str = "default"
    modules_to_save: tuple[str, ...] = ()
    kbit_upcast: bool = False


@dataclass(frozen=True, kw_only=True)
class Levers:
    """Anything that trades memory without changing what is learned (tiers 1 and 2)."""

    __pydantic_config__ = _CLOSED
    precision: Auto | Precision = "auto"
    autocast: Auto | bool = "auto"
    optimizer: str = "auto"
    checkpointing: str | Mapping[str, str] = "auto"
    loss: Literal["auto", "full-logits", "chunked", "fused"] = "auto"
    attention: Literal["auto", "eager", "sdpa", "flash"] = "auto"
    linear_attention: Literal["auto", "reference", "fla"] = "auto"
    parallel: Literal["auto", "none", "ddp", "zero1", "zero2", "zero3", "fsdp", "layers"] = "auto"
    offload: Literal["auto", "none", "optimizer", "params+optimizer"] = "auto"
    offload_to: Literal["auto", "host", "nvme"] = "auto"
    pin_memory: Auto | bool = "auto"
    activation_offload: Auto | bool = "auto"
    allocator: Literal["auto", "default", "expandable"] = "auto"
    micro_batch: Auto | int = "auto"
    packing: bool = False


@dataclass(frozen=True, kw_only=True)
class ImageBudget:
    """One image budget, compiled to each processor's own knob by the family. At most one may be a number.

    `downsample_mode` (MiniCPM-V 4.6 and later): patches that become one image token, 4 or 16. Like all that stands
    outside `levers`, it changes what is learned (tier 3); `auto` is the checkpoint's own.
    """

    __pydantic_config__ = _CLOSED
    max_slices: Auto | int = "auto"
    max_pixels: Auto | int = "auto"
    max_tokens: Auto | int = "auto"
    downsample_mode: Literal["auto", "4x", "16x"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to learn. `learning_rate` is one number or one per part."""

    __pydantic_config__ = _CLOSED
    epochs: float = 3
    steps: int | None = None
    learning_rate: float | Mapping[PartName, float] = 1.0e-5
    warmup: float = 0.03
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Loader:
    """The data loader's worker processes and how many batches each prepares ahead."""

    __pydantic_config__ = _CLOSED
    workers: Auto | int = "auto"
    prefetch: int = 2
    pin: Auto | bool = "auto"


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Greedy decoding at evaluation."""

    __pydantic_config__ = _CLOSED
    max_new_tokens: int = 512


@dataclass(frozen=True, kw_only=True)
class RunKeys:
    """The run folder and what happens in it."""

    __pydantic_config__ = _CLOSED
    folder: str = "auto"
    save_every: Auto | int = "auto"
    keep: int = 2
    eval_every: Auto | int = "auto"
    on_oom: Literal["stop", "tighten"] = "stop"
    report_to: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HardwareKeys:
    """Hardware as the user states it; see `specs.hardware.Hardware` for what it resolves to."""

    __pydantic_config__ = _CLOSED
    gpus: str
    host_memory: str | int | None = None
    nvme: str | int | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything the user may say. Read one with `memfit.inputs.recipe_file.load_recipe`."""

    __pydantic_config__ = _CLOSED
    model: str
    model_config: Mapping[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    workload: Auto | WorkloadKeys = "auto"
    method: Method = "full"
    parts: Mapping[PartName, str] = field(default_factory=dict)
    lora: Lora = field(default_factory=Lora)
    levers: Levers = field(default_factory=Levers)
    image: ImageBudget = field(default_factory=ImageBudget)
    max_length: Auto | int = "auto"
    batch: Auto | int = "auto"
    schedule: Schedule = field(default_factory=Schedule)
    loader: Loader = field(default_factory=Loader)
    generate: Generate = field(default_factory=Generate)
    run: RunKeys = field(default_factory=RunKeys)
    allow: Literal["nothing", "rounding", "learning"] = "rounding"
    goal: Literal["fast", "long"] = "fast"
    hardware: Auto | HardwareKeys = "auto"
    engine: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values, every key present."""
        return dataclasses.asdict(self)
