"""What a strategy file states: its layout, as numbers, and what its engine does to dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rapidfuzz import process

from memfit.errors import UserError
from memfit.specs.plan import Layout, Plan


@dataclass(frozen=True)
class Request:
    """What a layout depends on, as numbers and words of the recipe.

    `width`, `compute_width`: bytes of an element of the weights that learn, as the engine keeps them and as it computes
    with them; `master_width` of the copy that the optimizer steps, 0 without one. `hidden`: the language model's hidden
    size, for values that are "auto". `values`: the recipe's `engine:`. `offload`: none | optimizer | params+optimizer;
    `offload_to`: host | nvme; `pin`: page-locked.
    """

    ranks: int
    width: int = 2
    compute_width: int = 2
    master_width: int = 0
    hidden: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)
    offload: str = "none"
    offload_to: str = "host"
    pin: bool = False

    @property
    def home_optimizer(self) -> str:
        return self.offload_to if self.offload != "none" else "gpu"

    @property
    def home_parameters(self) -> str:
        return self.offload_to if self.offload == "params+optimizer" else "gpu"


def _no_engine(plan: Plan) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Strategy:
    """One value of `levers.parallel`.

    `layout(request)` gives the numbers. `casts_adapters` lists the precisions under which the engine turns adapters
    into the dtype of the other parameters that learn. `not_forecast`: engine buffers that are no states, in plain
    words. `values`: the keys of `engine: {section: ...}` that it reads, with what is taken where the recipe says
    nothing. `offloads`: what it can put elsewhere, as (levers.offload, levers.offload_to). `engine_config(plan)`: what
    the engine is told, every value explicit; empty where there is no engine. `replaces`: rows of
    `memfit.trace.cuda.ROWS`, the functions of torch that the engine replaces in every model by its own.
    """

    name: str
    layout: Callable[[Request], Layout]
    source: str
    casts_adapters: frozenset[str] = frozenset()
    not_forecast: tuple[str, ...] = ()
    min_ranks: int = 1
    max_ranks: int | None = None
    section: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    offloads: frozenset[tuple[str, str]] = frozenset()
    engine_config: Callable[[Plan], dict[str, Any]] = _no_engine
    replaces: tuple[str, ...] = ()


def engine_values(section: str, known: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in force: memfit's own, replaced by the recipe's `engine: {section: {...}}`.

    Raises UserError for a key that is unknown, of another engine, or of another kind than its default.
    """
    for name in values:
        if name != section:
            hint = f"engine: {{{section}: {{...}}}}" if section else "leave out engine"
            raise UserError(f"engine.{name} says nothing to this engine", hint)
    own = values.get(section, {}) if section else {}
    if not isinstance(own, Mapping):
        raise UserError(f"engine.{section}: {own!r} is not a mapping", f"engine: {{{section}: {{...}}}}")
    for key, value in own.items():
        if key not in known:
            near = process.extractOne(str(key), list(known))
            raise UserError(
                f"engine.{section}.{key}: unknown, or without a price in bytes",
                f"did you mean {near[0]}? All: {', '.join(known)}" if near else "leave it out",
            )
        kinds = (bool,) if isinstance(known[key], bool) else (int, float)
        automatic = value == "auto" and key in AUTOMATIC
        if not automatic and (not isinstance(value, kinds) or isinstance(value, bool) != (kinds == (bool,))):
            wanted = "true or false" if kinds == (bool,) else "a number"
            raise UserError(
                f"engine.{section}.{key}: {value!r} is not {wanted}", f"engine.{section}.{key}: {known[key]}"
            )
        if not automatic and kinds != (bool,) and not 0 <= value < 2**63:
            raise UserError(
                f"engine.{section}.{key}: {value} must be at least 0", f"engine.{section}.{key}: {known[key]}"
            )
    return {**known, **own}


# Keys that may be "auto", as transformers' integration fills them in from the hidden size.
# Source: transformers.integrations.deepspeed:HfTrainerDeepSpeedConfig.trainer_config_finalize.
AUTOMATIC: Mapping[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}


def number(values: Mapping[str, Any], key: str, hidden: int) -> int:
    """A value in force as a whole number; "auto" is worked out."""
    value = values[key]
    return AUTOMATIC[key](hidden) if value == "auto" else int(value)
