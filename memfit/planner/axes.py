"""What the planner may choose from: legal values of every lever that is `auto`, their tiers, and what runs them today.

A candidate is a set-up (what decides the states), a step (what decides the micro-batch) and a trim (values without a
price in seconds, taken off their defaults only as far as memory asks for it). Pins are the only value of their lever.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memfit.catalog.methods import METHODS
from memfit.catalog.optimizers import OPTIMIZERS
from memfit.catalog.precisions import PRECISIONS, ZERO, opens_autocast, supported
from memfit.planner.defaults import AUTO, USUAL_BATCH, bias_problems, lever_problems
from memfit.planner.problems import Problem
from memfit.specs.hardware import Hardware
from memfit.specs.profile import Profile
from memfit.specs.recipe import Recipe
from memfit.strategies import STRATEGIES

# Adam in other clothes: rounding alone differs. Other families learn otherwise (tier 3).
SAME_OPTIMIZERS: Mapping[str, int] = {"adamw": 1, "adamw-8bit": 2, "paged-adamw-8bit": 2}
CHECKPOINTING = ("none", "selective", "full")
# Values of the engine without a known price in seconds, from what stands where nobody asks (DeepSpeed's own defaults)
# to small. Smaller ones are more, shorter collectives: they are taken only where the larger do not fit.
ENGINE_LEVELS: Mapping[str, tuple[int, ...]] = {
    "sub_group_size": (10**9, 3 * 10**8, 10**8),
    "reduce_bucket_size": (5 * 10**8, 2 * 10**8, 10**8, 5 * 10**7),
    "stage3_prefetch_bucket_size": (5 * 10**7, 10**7),
    "stage3_max_live_parameters": (10**9, 3 * 10**8, 10**8),
    "stage3_max_reuse_distance": (10**9, 10**8),
}
STAGE_3_ONLY = ("sub_group_size",)  # and every key that says stage3
ALONE_MAY_USE = ("none", "zero2", "zero3")  # of one rank: an engine is of use for offload only


@dataclass(frozen=True)
class Setup:
    """What decides the states. `tier` as in the design; `would`: chosen values that no engine of memfit runs today."""

    parallel: str
    offload: str
    offload_to: str
    precision: str
    optimizer: str
    overlap: bool | None = None
    tier: int = 1
    would: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """What decides the micro-batch. `tier` 2 where a sum is rounded otherwise than in the documented default."""

    checkpointing: Any
    loss: str
    activation_offload: bool
    micro_batch: int
    tier: int = 1
    would: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trim:
    """Values without a price in seconds. `engine`: those off their defaults, in the order of ENGINE_LEVELS."""

    engine: tuple[tuple[str, int], ...] = ()
    pin_memory: bool = True
    allocator: str = "default"


@dataclass(frozen=True)
class Axes:
    """All that one recipe leaves open on one hardware: `recipe` has its batch, and still its pins and `auto`.

    `legal`: the steps that go together with each set-up, none of them empty. `problems`: of the first set-up that goes
    together with none, to be told where `legal` is empty.
    """

    recipe: Recipe
    hardware: Hardware
    legal: Mapping[Setup, tuple[Step, ...]]
    problems: tuple[Problem, ...] = ()


def axes_of(recipe: Recipe, hardware: Hardware, profile: Profile) -> Axes:
    """The open values, without what does not go together."""
    axes = Axes(dataclasses.replace(recipe, batch=batch_of(recipe, hardware)), hardware, {})
    judge = _Judge(axes, profile)
    steps = tuple(_steps(axes.recipe, hardware))
    legal: dict[Setup, tuple[Step, ...]] = {}
    problems: list[Problem] = []
    for setup in _setups(axes.recipe, hardware):
        mine = tuple(step for step in steps if not judge.problems(setup, step))
        if mine:
            legal[setup] = mine
        elif not problems and steps:
            problems = judge.problems(setup, steps[0])
    return dataclasses.replace(axes, legal=legal, problems=tuple(problems))


class _Judge:
    """What does not go together, each question asked once."""

    def __init__(self, axes: Axes, profile: Profile) -> None:
        self.axes, self.profile = axes, profile
        self.known: dict[Any, list[Problem]] = {}

    def problems(self, setup: Setup, step: Step) -> list[Problem]:
        setup, step = dataclasses.replace(setup, overlap=None), dataclasses.replace(step, micro_batch=1)
        key = (setup, str(step.checkpointing), step.loss, step.activation_offload)
        if key not in self.known:
            recipe = with_choice(self.axes, setup, step, Trim())
            self.known[key] = lever_problems(recipe, self.axes.hardware) + self._bias(recipe)
        return self.known[key]

    def _bias(self, recipe: Recipe) -> list[Problem]:
        key = (recipe.levers.parallel, str(recipe.levers.checkpointing))
        if key not in self.known:
            self.known[key] = bias_problems(recipe.levers, self.profile)
        return self.known[key]


def batch_of(recipe: Recipe, hardware: Hardware) -> int:
    """The batch: the recipe's, else the multiple of what one round takes that is nearest to the usual one."""
    if recipe.batch != AUTO:
        return int(recipe.batch)
    micro = 1 if recipe.levers.micro_batch == AUTO else int(recipe.levers.micro_batch)
    unit = hardware.ranks * micro
    return max(1, int(USUAL_BATCH / unit + 0.5)) * unit


def with_choice(axes: Axes, setup: Setup, step: Step, trim: Trim) -> Recipe:
    """The recipe that one candidate stands for: every lever has a value."""
    levers, engine = axes.recipe.levers, dict(axes.recipe.engine)
    section = STRATEGIES[setup.parallel].section
    own = dict(engine.get(section, {})) if section and "deepspeed" not in engine else {}
    own |= dict(trim.engine)
    if setup.overlap is not None:
        own["overlap_comm"] = setup.overlap
    if own:
        engine[section] = own
    chosen: dict[str, Any] = {
        "parallel": setup.parallel,
        "offload": setup.offload,
        "offload_to": setup.offload_to,
        "precision": setup.precision,
        "optimizer": setup.optimizer,
        "checkpointing": step.checkpointing,
        "loss": step.loss,
        "activation_offload": step.activation_offload,
        "micro_batch": step.micro_batch,
        "allocator": trim.allocator,
        "pin_memory": trim.pin_memory if setup.offload != "none" else _or(levers.pin_memory, False),
        "autocast": _or(levers.autocast, opens_autocast(setup.precision, setup.parallel)),
        "attention": _or(levers.attention, "sdpa"),
        "linear_attention": _or(levers.linear_attention, "reference"),
    }
    return dataclasses.replace(axes.recipe, levers=dataclasses.replace(levers, **chosen), engine=engine)


def trims(axes: Axes, setup: Setup) -> list[Trim]:
    """Every combination of values without a price, the documented default first."""
    pins: Sequence[bool] = (True,)
    if setup.offload != "none":
        pins = _values(axes.recipe.levers.pin_memory, (True, False))
    allocators = _values(axes.recipe.levers.allocator, ("default", "expandable") if axes.hardware.gpu else ("default",))
    open_keys = [(key, levels) for key, levels in ENGINE_LEVELS.items() if _is_open(axes, setup, key)]
    found = []
    for pin, allocator, *levels in itertools.product(pins, allocators, *(levels for _, levels in open_keys)):
        pairs = zip(open_keys, levels, strict=True)
        engine = tuple((key, level) for (key, known), level in pairs if level != known[0])
        found.append(Trim(engine, pin, allocator))
    return found


def ladder(axes: Axes, setup: Setup) -> list[Trim]:
    """Trims from the default to the least memory, every open value one level smaller from rung to rung."""
    levels = {key: known for key, known in ENGINE_LEVELS.items() if _is_open(axes, setup, key)}
    pinned, allocator = axes.recipe.levers.pin_memory, axes.recipe.levers.allocator
    base = Trim((), True if pinned == AUTO else bool(pinned), "default" if allocator == AUTO else allocator)
    rungs = [base]
    for height in range(1, max((len(known) for known in levels.values()), default=1)):
        engine = tuple((key, known[min(height, len(known) - 1)]) for key, known in levels.items())
        rungs.append(dataclasses.replace(base, engine=engine))
    if setup.offload != "none" and pinned == AUTO:
        rungs += [dataclasses.replace(one, pin_memory=False) for one in (rungs[0], rungs[-1])]
    return list(dict.fromkeys(rungs))


def reverted(trim: Trim) -> Iterator[Trim]:
    """The trim with one of its engine values back at the default."""
    for key, _ in trim.engine:
        yield dataclasses.replace(trim, engine=tuple(pair for pair in trim.engine if pair[0] != key))


def _setups(recipe: Recipe, hardware: Hardware) -> Iterator[Setup]:
    levers, ranks = recipe.levers, hardware.ranks
    usual = ("none",) if ranks == 1 and hardware.gpu is None else ALONE_MAY_USE
    parallels = usual if ranks == 1 else tuple(name for name in STRATEGIES if name != "none")
    for parallel in _values(levers.parallel, parallels):
        strategy = STRATEGIES.get(parallel)
        homes = [("none", "host"), *sorted(strategy.offloads)] if strategy else [("none", "host")]
        if parallel in ZERO and ranks == 1 and levers.parallel == AUTO:
            homes = homes[1:]
        for offload, where in homes:
            if not (_allows(levers.offload, offload) and (offload == "none" or _allows(levers.offload_to, where))):
                continue
            for precision in _precisions(recipe, parallel, hardware):
                for optimizer in _values(levers.optimizer, _optimizers(recipe, offload, hardware)):
                    for overlap in _overlaps(recipe, parallel, ranks if hardware.gpu else 1):  # a CPU has no streams
                        yield _setup(recipe, hardware, (parallel, offload, where, precision, optimizer, overlap))


def _setup(recipe: Recipe, hardware: Hardware, values: tuple[Any, ...]) -> Setup:
    parallel, offload, where, precision, optimizer, overlap = values
    levers, tier, would = recipe.levers, 1, []
    if levers.precision == AUTO and precision != default_precision(recipe, parallel, hardware):
        tier = 2
    if levers.optimizer == AUTO:
        tier = max(tier, SAME_OPTIMIZERS.get(optimizer, 3))
        row = OPTIMIZERS[optimizer]
        if not row.runs_today or not is_here(row.package):
            would.append(f"levers.optimizer: {optimizer}" + (f" without {row.package}" if row.runs_today else ""))
    if levers.parallel == AUTO and parallel not in METHODS[recipe.method].runs_on:
        would.append(f"method: {recipe.method} with levers.parallel: {parallel}")
    if levers.offload_to == AUTO and where != "host":
        would.append(f"levers.offload_to: {where}")
    return Setup(parallel, offload, where, precision, optimizer, overlap, tier, tuple(would))


def default_precision(recipe: Recipe, parallel: str, hardware: Hardware) -> str:
    """The documented default under a layout: fp32 master weights and 16-bit computation, or what adapters use."""
    if parallel in ZERO:
        name, old = "bf16-mixed", "fp16-mixed"
    else:
        name, old = METHODS[recipe.method].default_precision, "fp16-amp"
    return name if supported(PRECISIONS[name], hardware) else old


def _precisions(recipe: Recipe, parallel: str, hardware: Hardware) -> tuple[str, ...]:
    """The documented default, and what needs less. fp32, and fp16 beside bf16, are never less or faster than it."""
    if recipe.levers.precision != AUTO:
        return (str(recipe.levers.precision),)
    default = default_precision(recipe, parallel, hardware)
    less = "pure-bf16"
    return (default, less) if less != default and supported(PRECISIONS[less], hardware) else (default,)


def _optimizers(recipe: Recipe, offload: str, hardware: Hardware) -> tuple[str, ...]:
    """AdamW, its 8-bit forms, and other families where learning may change; foreach is never less than fused."""
    names = list(SAME_OPTIMIZERS)
    if recipe.allow == "learning":
        names += [name for name in OPTIMIZERS if name not in names and name != "adamw-foreach"]
    here = [name for name in names if hardware.gpu or not OPTIMIZERS[name].needs_gpu]
    return tuple(name for name in here if offload == "none" or name == "adamw")


def _overlaps(recipe: Recipe, parallel: str, ranks: int) -> tuple[bool | None, ...]:
    own = recipe.engine.get(STRATEGIES[parallel].section, {}) if parallel in STRATEGIES else {}
    if parallel not in ZERO or "deepspeed" in recipe.engine or "overlap_comm" in own or ranks == 1:
        return (None,)
    return (False, True)


def _steps(recipe: Recipe, hardware: Hardware) -> Iterator[Step]:
    levers = recipe.levers
    each = max(1, int(recipe.batch) // hardware.ranks)
    micros = _values(levers.micro_batch, [n for n in range(1, each + 1) if each % n == 0])
    losses = ["full-logits", "chunked"] + (["fused"] if hardware.gpu and fused_is_here() else [])
    for checkpointing in _values(levers.checkpointing, CHECKPOINTING):
        for moved in _values(levers.activation_offload, (False, True) if hardware.gpu else (False,)):
            if moved and checkpointing == "none":
                continue
            for loss in _values(levers.loss, losses):
                for micro in micros:
                    # Liger's kernel makes the gradient of the logits in 16 bit, chunk by chunk.
                    yield Step(checkpointing, loss, moved, int(micro), 2 if loss == "fused" != levers.loss else 1)


def is_here(package: str) -> bool:
    """Whether a package that a row needs is installed; "" needs none."""
    return not package or importlib.util.find_spec(package) is not None


def fused_is_here() -> bool:
    """Whether the package that has the fused loss is installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def _is_open(axes: Axes, setup: Setup, key: str) -> bool:
    """Whether a value of the engine may be chosen: it acts under this layout, and nobody pinned it."""
    strategy = STRATEGIES[setup.parallel]
    if key not in strategy.values or "deepspeed" in axes.recipe.engine:
        return False
    stage_3 = key in STAGE_3_ONLY or key.startswith("stage3")
    return (not stage_3 or setup.parallel == "zero3") and key not in axes.recipe.engine.get(strategy.section, {})


def _values(said: Any, known: Sequence[Any]) -> Sequence[Any]:
    """A pin alone, or everything that is known."""
    return known if said == AUTO else (said,)


def _allows(said: Any, value: Any) -> bool:
    return bool(said in (AUTO, value))


def _or(said: Any, value: Any) -> Any:
    return value if said == AUTO else said
