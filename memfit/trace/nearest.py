"""What would make a plan possible where nothing fits: single changes, then pairs, each searched as the recipe was."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from memfit.catalog.gpus import GPUS
from memfit.catalog.methods import METHODS
from memfit.catalog.precisions import PRECISIONS, supported
from memfit.errors import UserError
from memfit.planner.answer import gives
from memfit.planner.axes import Setup, Step
from memfit.planner.plan_text import summary
from memfit.planner.search import Fit, Limits
from memfit.specs.hardware import Hardware
from memfit.specs.recipe import HardwareKeys, Levers, Recipe, WorkloadKeys
from memfit.specs.search import Nearest
from memfit.trace.forecast import DEFAULT_TOKENS
from memfit.trace.planning import NO_DATA, Say, search_of
from memfit.trace.prepare import Prepared, prepare
from memfit.units import gib

WANTED = 5
PAIRS = 8  # pairs that are tried
Change = Callable[[Recipe], Recipe]


@dataclass(frozen=True)
class Option:
    """One change of a recipe in words; `learning`: it changes what is learned."""

    words: str
    change: Change
    learning: bool


def nearest(prepared: Prepared, say: Say) -> list[Nearest]:
    """The changes that make a plan possible, each with what it gives: all single ones, pairs where there is none."""
    options = list(_options(prepared))
    found = list(itertools.islice(_that_fit(prepared, [(one,) for one in options], say), WANTED))
    if not found:
        pairs = list(itertools.islice(itertools.combinations(options, 2), PAIRS))
        found = list(itertools.islice(_that_fit(prepared, pairs, say), 2))
    return found


def taken(prepared: Prepared, say: Say) -> Fit | None:
    """The fastest plan of the changes that only alter what is learned (`allow: learning`); None where none fits."""
    fits = [_searched(prepared, (one,), say) for one in _options(prepared) if one.learning]
    return min((fit for fit in fits if fit is not None), key=lambda fit: fit.seconds, default=None)


def _that_fit(prepared: Prepared, choices: Sequence[tuple[Option, ...]], say: Say) -> Iterator[Nearest]:
    for options in choices:
        fit = _searched(prepared, options, say)
        if fit is not None:
            words = " and ".join(one.words for one in options)
            yield Nearest(words, f"{summary(fit.forecast)}: {gives(fit.forecast)}")


def _searched(prepared: Prepared, options: Sequence[Option], say: Say) -> Fit | None:
    recipe = prepared.recipe
    for option in options:
        recipe = option.change(recipe)
    say(f"trying {' and '.join(option.words for option in options)}")
    try:
        changed = prepare(recipe, catalogue=True)
        outcome = search_of(changed, NO_DATA, say).run(Limits(_runs_and_rounds, 1))
    except UserError:
        return None
    return outcome.fits[0] if outcome.fits else None


def _runs_and_rounds(setup: Setup, step: Step) -> bool:
    return not (setup.would or step.would) and max(setup.tier, step.tier) <= 2


def _options(prepared: Prepared) -> Iterator[Option]:
    recipe, hardware = prepared.recipe, prepared.hardware
    if hardware.gpu is not None:
        yield from _hardware_options(recipe, hardware)
    if hardware.host_memory_bytes is not None:
        more = 2 * hardware.host_memory_bytes
        keys = HardwareKeys(gpus=hardware.text, host_memory=more, nvme=hardware.nvme_bytes)
        yield Option(f"{gib(more, 0)} of host memory", _setting(hardware=keys), False)
    if recipe.levers != Levers():
        yield Option("every lever auto (nothing pinned under levers)", _setting(levers=Levers()), False)
    if recipe.method == "full" and not any(mode.startswith(("full", "last")) for mode in recipe.parts.values()):
        yield _method("lora")
        yield _method("qlora")
    elif recipe.method == "lora" and hardware.gpu is not None:
        yield _method("qlora")
    if prepared.family.images is not None and recipe.image.max_slices == "auto":
        image = dataclasses.replace(recipe.image, max_slices=1)
        yield Option("image.max_slices: 1", _setting(image=image), True)
    keys_ = recipe.workload if isinstance(recipe.workload, WorkloadKeys) else WorkloadKeys()
    tokens = (keys_.tokens or DEFAULT_TOKENS) // 2
    yield Option(f"samples of {tokens} tokens", _setting(workload=dataclasses.replace(keys_, tokens=tokens)), True)


def _method(name: str) -> Option:
    words = f"method: {name}" + ("" if METHODS[name].runs_today else " (forecast only in this version)")
    return Option(words, _setting(method=name), True)


def _hardware_options(recipe: Recipe, hardware: Hardware) -> Iterator[Option]:
    """One GPU more, or the next number that divides a pinned batch; the next larger cards."""
    gpu = hardware.gpu
    assert gpu is not None
    memory = hardware.host_memory_bytes

    def keys(gpus: str) -> HardwareKeys:
        return HardwareKeys(gpus=gpus, host_memory=memory, nvme=hardware.nvme_bytes)

    each = hardware.gpus_per_node
    counts = [n for n in range(each + 1, 17) if recipe.batch == "auto" or int(recipe.batch) % (n * hardware.nodes) == 0]
    if counts:
        more = dataclasses.replace(hardware, gpus_per_node=counts[0]).text
        yield Option(more, _setting(hardware=keys(more)), False)
    wanted = PRECISIONS["bf16-amp"]
    larger = [row for row in GPUS if row.nominal_gib > gpu.nominal_gib and row.speed is not None]
    larger = [row for row in larger if supported(wanted, dataclasses.replace(hardware, gpu=row))]
    sizes = sorted({row.nominal_gib for row in larger})[:3]
    for size in sizes:
        row = min((row for row in larger if row.nominal_gib == size), key=lambda row: row.capacity_bytes)
        text = dataclasses.replace(hardware, gpu=row).text
        yield Option(text, _setting(hardware=keys(text)), False)


def _setting(**values: object) -> Change:
    def change(recipe: Recipe) -> Recipe:
        return dataclasses.replace(recipe, **values)  # type: ignore[arg-type]

    return change
