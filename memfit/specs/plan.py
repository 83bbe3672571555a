"""A plan: recipe, chosen levers, layout, forecast, and why. What `train` runs and `plan.json` holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from memfit.specs.engine_numbers import ALONE, EngineNumbers
from memfit.specs.hardware import Hardware
from memfit.specs.ledger import Ledger
from memfit.specs.recipe import Recipe
from memfit.specs.trace import StepTrace
from memfit.specs.workload import Workload


@dataclass(frozen=True)
class Reserved:
    """What the caching allocator's replay of two steps gave, in bytes, and what lies outside the allocator.

    `requested` is the largest sum of tensors, `peak_allocated` that of their blocks (torch.cuda.max_memory_allocated),
    `peak_reserved` that of the segments (max_memory_reserved). `outside`: (term id, bytes, source) of context and
    libraries. `source` says how the replay was made. `unlimited` is what would be reserved on a card without end; where
    that is too much, the other figures are those of this card, `runs` says whether the replay succeeded there, and
    `smallest` the least that the allocator must get for it to succeed (for information: success is not monotone).
    """

    requested: int
    peak_allocated: int
    peak_reserved: int
    outside: tuple[tuple[str, int, str], ...]
    source: str
    unlimited: int | None = None
    smallest: int | None = None
    runs: bool = True


@dataclass(frozen=True)
class Interval:
    """Between `low_bytes` and `high_bytes` lies what is measured, with probability `level`."""

    low_bytes: int
    high_bytes: int
    level: float


@dataclass(frozen=True)
class NodeFigures:
    """Bytes of the fullest node: host memory at its peak, what of it is page-locked, one checkpoint, states on NVMe.

    `peak_phase`: when that peak is; `high_bytes`: the upper end of its 90% interval.
    """

    peak_bytes: int
    pinned_bytes: int
    checkpoint_bytes: int
    nvme_bytes: int
    peak_phase: str
    high_bytes: int


@dataclass(frozen=True)
class Layout:
    """How states are placed, as numbers only: split how many ways, living where.

    `split_unit` says what is divided: "part" (all tensors of a part end to end), "tensor" (each by itself) or "rows"
    (the first dimension of each); the worst rank holds the larger share. `gradient_copies` more copies of the gradients
    exist, each split `split_gradient_copies` ways. `resident` names what is allocated once and stays, among "gradients"
    and "gradient copies". `home_parameters`, `home_optimizer`: gpu, host or nvme; `pinned`: page-locked in host memory.
    `gradients_end`: the last phase in which gradients are alive. `whole_at_edges`: "gradients" or "gradient_copies"
    whose share holds tensors that two ranks share as a whole. `engine`: what exists beside states. `source` is
    upstream's `module:qualname`.
    """

    name: str
    split_parameters: int = 1
    split_gradients: int = 1
    split_optimizer: int = 1
    home_parameters: str = "gpu"
    home_optimizer: str = "gpu"
    split_unit: str = "part"
    gradient_copies: int = 0
    split_gradient_copies: int = 1
    resident: tuple[str, ...] = ()
    engine: EngineNumbers = ALONE
    gradients_end: str = "step"
    whole_at_edges: str = ""
    pinned: bool = False
    source: str = ""


@dataclass(frozen=True)
class Speed:
    """One optimizer step of worst micro-batches. `bound`: what it waits for most, a key of `physics.speed.PARTS`.

    `low_seconds`: everything overlaps that may; `high_seconds`: nothing does.
    """

    step_seconds: float
    tokens_per_second: float
    bound: str
    low_seconds: float
    high_seconds: float


@dataclass(frozen=True)
class Forecast:
    """What a run will need. Figures that cannot be forecast yet are None, never 0.

    `notes`: what a reader must know of the model behind the figures, one sentence each.
    """

    verdict: str  # fits | borderline | does-not-fit | unknown
    fits: bool | None
    ledger: Ledger
    recipe: Recipe
    defaults: tuple[str, ...]
    hardware: Hardware
    workload: Workload | None
    trainable: dict[str, int] = field(default_factory=dict)
    frozen: dict[str, int] = field(default_factory=dict)
    trace: StepTrace | None = None
    reserved: Reserved | None = None
    layout: Layout | None = None
    node: NodeFigures | None = None
    interval: Interval | None = None
    notes: tuple[str, ...] = ()
    speed: Speed | None = None


@dataclass(frozen=True)
class Plan:
    """One runnable choice. `recipe` is effective: no `auto` is left in what the run needs."""

    recipe: Recipe
    layout: Layout
    forecast: Forecast
    tier: int
    reasons: tuple[str, ...] = ()
