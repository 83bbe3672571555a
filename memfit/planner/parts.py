"""Which parameters learn, where adapters go and what is held in 4 bit: the recipe's words on a model's own names.

`memfit.build` does what `resolve_parts` says, name by name, so that what is counted here is what is built there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rapidfuzz import process

from memfit.catalog.methods import METHODS, MethodRow, default_mode
from memfit.families.base import Family
from memfit.physics.memory import Shape, numel
from memfit.planner.problems import Problem, as_error, listed
from memfit.specs.profile import ParameterRow, Profile
from memfit.specs.recipe import Lora, Recipe

LAST_N = re.compile(r"^last-([0-9]+)$")
# PEFT has adapters for more kinds; these are the ones whose size is checked against it.
LINEAR = ("linear", "linear-transposed")
ADAPTABLE = (*LINEAR, "embedding")
# The order in which parts are shown: the way of the data.
ORDER = ("vision", "audio", "connector", "language", "tts", "head")


@dataclass(frozen=True)
class ResolvedParts:
    """The recipe's words as names.

    `modes`: part -> frozen, lora, full or last-N. `learning`: parameters trained in place. `lora_modules`: full names
    of the modules that get an adapter. `saved_modules`: full names of `lora.modules_to_save`, of which PEFT trains a
    copy. `quantised`: weights held in 4 bit. `idle`: parameters of parts that learn whose output the loss never sees:
    frozen, in the dtype of their neighbours.
    """

    modes: Mapping[str, str]
    learning: frozenset[str]
    lora_modules: tuple[str, ...] = ()
    saved_modules: tuple[str, ...] = ()
    quantised: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()

    def learns(self, parameter: str) -> bool:
        """Whether a parameter of the model is trained in place."""
        return parameter in self.learning


@dataclass(frozen=True)
class PartGroup:
    """The tensors of one part by fate. `frozen` holds what is kept as it is, `quantised` what is kept in 4 bit, `idle`
    what is kept in the dtype of what learns (see `ResolvedParts`)."""

    part: str
    mode: str
    learning: tuple[ParameterRow, ...]
    frozen: tuple[ParameterRow, ...]
    quantised: tuple[ParameterRow, ...]
    adapters: tuple[ParameterRow, ...]
    saved: tuple[ParameterRow, ...]
    idle: tuple[ParameterRow, ...] = ()

    @property
    def trainable_numel(self) -> int:
        return numel(shapes(self.learning)) + numel(shapes(self.adapters)) + numel(shapes(self.saved))

    @property
    def frozen_numel(self) -> int:
        return numel(shapes(self.frozen)) + numel(shapes(self.quantised)) + numel(shapes(self.idle))


def shapes(rows: Sequence[ParameterRow]) -> tuple[Shape, ...]:
    return tuple(row.shape for row in rows)


def resolve_parts(recipe: Recipe, family: Family, profile: Profile) -> ResolvedParts:
    """What learns and how. Raises UserError with everything that does not fit this model."""
    resolved, problems = resolve_with_problems(recipe, family, profile)
    if problems:
        raise as_error(problems)
    return resolved


def resolve_with_problems(recipe: Recipe, family: Family, profile: Profile) -> tuple[ResolvedParts, list[Problem]]:
    """As `resolve_parts`, with the problems as a list; the result is usable only when it is empty."""
    model = _Model(recipe, family, profile)
    problems = [*_part_problems(model)]
    modes = {part: model.mode(part) for part in model.parts}
    learning = frozenset(row.name for row in profile.parameters if model.learns(row))
    saved, saved_problems = _saved_modules(model)
    targets, target_problems = _lora_modules(model, saved)
    problems += [*saved_problems, *target_problems]
    if not problems and not (learning or targets or saved):
        problems.append(("every part is frozen: nothing would learn", "set parts.language to full or lora"))
    idle = frozenset(r.name for r in profile.parameters if not r.reached and modes[r.part] not in ("frozen", "lora"))
    resolved = ResolvedParts(modes, learning, targets, saved, _quantised(model, saved), idle)
    return resolved, problems


def parameter_groups(profile: Profile, resolved: ResolvedParts, lora: Lora) -> tuple[PartGroup, ...]:
    """Every tensor of the model and its adapters once, by part and fate. A tied tensor counts where it is owned."""
    owned = [row for row in profile.parameters if row.tied_to is None]
    by_module = {row.module: row for row in profile.parameters if row.name == f"{row.module}.weight"}
    adapters = [row for name in resolved.lora_modules for row in adapter_tensors(by_module[name], lora)]
    saved = [row for row in profile.parameters if _inside(row.module, resolved.saved_modules)]
    groups = []
    for part, mode in resolved.modes.items():
        own = [row for row in owned if row.part == part]
        group = PartGroup(
            part=part,
            mode=mode,
            learning=tuple(row for row in own if row.name in resolved.learning),
            frozen=tuple(r for r in own if not {r.name} & (resolved.learning | resolved.quantised | resolved.idle)),
            quantised=tuple(row for row in own if row.name in resolved.quantised),
            adapters=tuple(row for row in adapters if row.part == part),
            saved=tuple(row for row in saved if row.part == part),
            idle=tuple(row for row in own if row.name in resolved.idle),
        )
        if group.trainable_numel or group.frozen_numel:
            groups.append(group)
    return tuple(groups)


def adapter_tensors(weight: ParameterRow, lora: Lora) -> Iterator[ParameterRow]:
    """The tensors that PEFT adds to one module: A (rank x in), B (out x rank) and, for DoRA, a magnitude an output.

    Source: peft.tuners.lora.layer:Linear and Embedding; an embedding leads from its rows to its columns.
    """
    out, into = weight.shape if weight.kind == "linear" else weight.shape[::-1]
    sizes: list[tuple[str, Shape]] = [("lora_A", (lora.rank, into)), ("lora_B", (out, lora.rank))]
    if lora.variant == "dora":
        sizes.append(("lora_magnitude_vector", (out,)))
    for name, shape in sizes:
        yield ParameterRow(f"{weight.module}.{name}", shape, lora.dtype, weight.part, weight.module, "adapter")


class _Model:
    """A profile with the questions that resolving asks of it."""

    def __init__(self, recipe: Recipe, family: Family, profile: Profile) -> None:
        self.recipe, self.family, self.profile = recipe, family, profile
        self.method: MethodRow = METHODS[recipe.method]
        self.by_name = {row.name: row for row in profile.parameters}
        found = dict.fromkeys(row.part for row in profile.parameters)
        self.parts = tuple(sorted(found, key=lambda part: ORDER.index(part) if part in ORDER else len(ORDER)))
        blocks: dict[str, int] = {}
        for row in profile.parameters:
            if row.block is not None and row.reached:
                blocks[row.part] = max(blocks.get(row.part, 0), row.block + 1)
        self.blocks = blocks

    def pinned(self, part: str) -> str | None:
        return {str(name): mode for name, mode in self.recipe.parts.items()}.get(part)

    def owner(self, row: ParameterRow) -> ParameterRow:
        return self.by_name[row.tied_to] if row.tied_to else row

    def is_tied(self, part: str) -> bool:
        """Whether the part has no tensor of its own, as an output head tied to the embeddings."""
        return all(row.tied_to for row in self.profile.parameters if row.part == part)

    def mode(self, part: str) -> str:
        """How the part is trained. A part without tensors of its own follows the one that holds them."""
        pinned = self.pinned(part)
        if pinned is not None:
            return pinned
        if self.is_tied(part):
            rows = [row for row in self.profile.parameters if row.part == part]
            return "full" if any(self.learns(row) for row in rows) else "frozen"
        return default_mode(self.method, part)

    def learns(self, row: ParameterRow) -> bool:
        """Whether a parameter is trained in place; a tied one does what its owner does."""
        row = self.owner(row)
        if not row.reached:
            return False
        mode = self.pinned(row.part) or default_mode(self.method, row.part)
        last = LAST_N.match(mode)
        if last:
            return row.block is not None and row.block >= self.blocks.get(row.part, 0) - int(last[1])
        return mode == "full"

    def lora_parts(self) -> list[str]:
        return [part for part in self.parts if self.mode(part) == "lora"]

    def adaptable(self, part: str) -> list[ParameterRow]:
        """The weights in a part that can carry an adapter."""
        rows = [row for row in self.profile.parameters if row.part == part]
        return [row for row in rows if row.kind in ADAPTABLE and row.name == f"{row.module}.weight"]


def _part_problems(model: _Model) -> Iterator[Problem]:
    recipe, method = model.recipe, model.method
    for part in map(str, recipe.parts):
        if part not in model.parts:
            yield (
                f"parts.{part}: a {model.profile.model_type} model has {listed(model.parts, 'and')}, no {part} part",
                f"leave out parts.{part}",
            )
    for part in model.parts:
        mode = model.mode(part)
        last = LAST_N.match(mode)
        blocks = model.blocks.get(part, 0)
        if last and not blocks:
            yield f"parts.{part}: {mode}, but the {part} part has no numbered blocks", f"parts.{part}: full or frozen"
        elif last and not 1 <= int(last[1]) <= blocks:
            yield f"parts.{part}: {mode}, but the {part} part has {blocks} blocks", f"last-1 to last-{blocks}"
        if part == method.quantised_part and mode not in {"lora", "frozen"}:
            yield (
                f"parts.{part}: {mode}, but {method.name} holds the {part} part in 4 bit, which cannot learn in place",
                f"parts.{part}: lora, or method: lora",
            )
        yield from _tied_problems(model, part)


def _tied_problems(model: _Model, part: str) -> Iterator[Problem]:
    pinned = model.pinned(part)
    if pinned is None or not model.is_tied(part):
        return
    row = next(row for row in model.profile.parameters if row.part == part)
    owner = model.owner(row)
    if (pinned == "full") != model.learns(owner):
        yield (
            f"parts.{part}: {pinned}, but {row.name} is tied to {owner.name} of the {owner.part} part, "
            f"which is {model.mode(owner.part)}",
            f"leave out parts.{part}, so that it follows the {owner.part} part",
        )


def _saved_modules(model: _Model) -> tuple[tuple[str, ...], list[Problem]]:
    endings = model.recipe.lora.modules_to_save
    if not endings:
        return (), []
    if not model.lora_parts():
        return (), [("lora.modules_to_save acts beside adapters, and no part is lora", "set the parts to full instead")]
    modules = list(dict.fromkeys(prefix for row in model.profile.parameters for prefix in _prefixes(row.module)))
    chosen, problems = _matching(modules, endings, "lora.modules_to_save", "in this model")
    outer = tuple(name for name in chosen if not _inside(name, [other for other in chosen if other != name]))
    for name in outer:
        inside = [row for row in model.profile.parameters if _inside(row.module, (name,))]
        if any(model.learns(row) for row in inside):
            problems.append(
                (
                    f"lora.modules_to_save: {name} is in a part that learns already",
                    f"leave {name} out, or freeze its part",
                )
            )
    return outer, problems


def _lora_modules(model: _Model, saved: Sequence[str]) -> tuple[tuple[str, ...], list[Problem]]:
    """Full names of the modules that get an adapter. What PEFT saves in full gets none, as in PEFT."""
    targets, parts = model.recipe.lora.targets, model.lora_parts()
    if not parts:
        if model.method.parts:
            hint = "set parts.language: lora, or method: full"
            return (), [(f"method: {model.method.name}, but no part is lora", hint)]
        if targets != "auto":
            return (), [("lora.targets is set, but no part is lora", "set method: lora, or a part to lora")]
        return (), []
    rows = [r for part in parts for r in model.adaptable(part) if r.reached and not _inside(r.module, saved)]
    if not isinstance(targets, str):
        where = f"in the {listed(parts, 'and')} part{'s' if len(parts) > 1 else ''}"
        chosen, problems = _matching([row.module for row in rows], targets, "lora.targets", where)
        return tuple(chosen), problems
    wanted: Callable[[ParameterRow], bool] = _is_auto(model.family) if targets == "auto" else _is_inner_linear
    chosen = [row.module for row in rows if wanted(row)]
    problems = []
    for part in parts:
        if not any(wanted(row) for row in rows if row.part == part):
            problems.append(
                (f"parts.{part}: lora, but lora.targets: {targets} names no module there", _target_hint(targets, part))
            )
    return tuple(chosen), problems


def _is_auto(family: Family) -> Callable[[ParameterRow], bool]:
    """`auto`: the attention and MLP projections of the language part."""
    return lambda row: row.part == "language" and any(_ends(row.module, name) for name in family.lora_targets)


def _is_inner_linear(row: ParameterRow) -> bool:
    """`all-linear`: every Linear, heads excepted."""
    return row.kind in LINEAR and row.part != "head"


def _target_hint(targets: str, part: str) -> str:
    if part == "head":
        return "lora.targets: [lm_head, ...], or parts.head: frozen"
    return "lora.targets: all-linear" if targets == "auto" else f"parts.{part}: full or frozen"


def _matching(names: Sequence[str], endings: Sequence[str], key: str, where: str) -> tuple[list[str], list[Problem]]:
    """The names with one of the endings, in the model's order, and a problem for each ending without a match."""
    chosen = [name for name in names if any(_ends(name, ending) for ending in endings)]
    problems: list[Problem] = []
    for ending in endings:
        if not any(_ends(name, ending) for name in names):
            known = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
            near = [name for name, _, _ in process.extract(ending.rsplit(".", 1)[-1], known, limit=3)]
            hint = f"did you mean {listed(near)}?" if near else "leave it out"
            problems.append((f"{key}: no module {where} ends in {ending!r}", hint))
    return chosen, problems


def _quantised(model: _Model, saved: Sequence[str]) -> frozenset[str]:
    """Names of the weights held in 4 bit: the Linear ones of the method's part that are not kept whole elsewhere."""
    return frozenset(
        row.name
        for part in model.parts
        if part == model.method.quantised_part
        for row in model.adaptable(part)
        if row.kind in LINEAR and row.tied_to is None and not _inside(row.module, saved)
    )


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _prefixes(name: str) -> Iterator[str]:
    pieces = name.split(".")
    for count in range(1, len(pieces) + 1):
        yield ".".join(pieces[:count])
