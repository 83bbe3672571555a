"""A forecast for people: the verdict, a table by part, and what is missing. Readable without colour."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz import process

from memfit.errors import UserError
from memfit.planner.activations import peak_of, process_bytes
from memfit.planner.estimate import capacity_bytes, states_place
from memfit.planner.problems import listed
from memfit.specs.ledger import PHASES, Term
from memfit.specs.plan import Forecast
from memfit.specs.recipe import Recipe
from memfit.specs.trace import TRACED_PHASES
from memfit.units import count_text, gib

# Column of the table -> the pieces of a term's id that belong to it.
COLUMNS: dict[str, tuple[str, ...]] = {
    "weights": ("weights", "quant"),
    "gradients": ("gradients",),
    "grad copy": ("gradient_copies",),
    "master": ("master",),
    "optimizer": ("optimizer", "paged"),
    "other": ("buffers", "step"),
}


# Parts of a ledger that are no states: they have a table of their own.
NO_STATES = {"batch", "activations", "allocator", "process"}
PEAK_PHASES = ("load", *TRACED_PHASES, "step")


def estimate_text(forecast: Forecast) -> str:
    """The whole answer of `memfit estimate` as text."""
    lines = [_verdict(forecast), "", _run(forecast), "", *_table(forecast), ""]
    lines += _peaks(forecast) if forecast.trace is not None else _phases(forecast)
    lines += [
        "",
        f"not forecast yet: {', '.join(forecast.ledger.missing)}",
        f"defaults taken: {', '.join(forecast.defaults) or 'none'}",
    ]
    return "\n".join(lines)


def why(forecast: Forecast, term_id: str) -> str:
    """The formula, numbers and source of one term. UserError naming the nearest ids for an unknown one."""
    terms = {term.id: term for term in forecast.ledger.terms}
    if term_id not in terms:
        near = [name for name, _, _ in process.extract(term_id, list(terms), limit=3)]
        raise UserError(
            f"no term {term_id!r} in this forecast", f"did you mean {listed(near)}? All: {', '.join(sorted(terms))}"
        )
    term = terms[term_id]
    return "\n".join(
        (
            f"{term.id}: {term.name}",
            f"  {gib(term.bytes)} = {term.bytes:,} B",
            f"  formula: {term.formula}",
            f"  place:   {term.place}, in the phases {', '.join(term.alive)}",
            f"  source:  {term.source}",
        )
    )


def _verdict(forecast: Forecast) -> str:
    capacity = capacity_bytes(forecast.hardware)
    phase, size = _largest_phase(forecast)
    where = "a GPU" if forecast.hardware.gpu else "a node"
    room = f", {where} has {gib(capacity)}" if capacity is not None else ""
    states = f"states alone take {gib(size)} in the {phase} phase{room}"
    count = len(forecast.defaults)
    tail = f"{count} value{'s were defaults' if count != 1 else ' was a default'}, nothing was searched"
    if forecast.trace is not None:
        return f"{_traced_verdict(forecast, room)}; {tail}"
    if forecast.verdict == "does-not-fit":
        return f"does not fit: {states}; {tail}"
    return f"unknown: {states}; activations are not forecast yet; {tail}"


def _traced_verdict(forecast: Forecast, room: str) -> str:
    phase, size = peak_of(forecast) or ("", 0)
    process, reserved = process_bytes(forecast), forecast.reserved
    verdict = forecast.verdict.replace("-", " ")
    if process is None or reserved is None:
        return f"{verdict}: states and activations peak at {gib(size)} in {phase}{room}, the process itself on top"
    return (
        f"{verdict}: the process peaks at {gib(process)}{room}; {gib(reserved.peak_reserved)} reserved, "
        f"{gib(size)} allocated in {phase} (no GPU has confirmed this yet)"
    )


def _largest_phase(forecast: Forecast) -> tuple[str, int]:
    sizes = forecast.ledger.phase_bytes(states_place(forecast.hardware))
    # Among equals the step, where everything that trains is alive.
    phase = max(PHASES, key=lambda name: (sizes[name], name == "step"))
    return phase, sizes[phase]


def _run(forecast: Forecast) -> str:
    recipe, hardware = forecast.recipe, forecast.hardware
    levers = recipe.levers
    steps = f"batch {recipe.batch} = {hardware.ranks} x micro-batch {levers.micro_batch} x {_micro_batches(forecast)}"
    text = f"{recipe.model} on {hardware.text}: {recipe.method}, {levers.precision}, {levers.optimizer}, "
    text += f"parallel {levers.parallel}, {steps}"
    if hardware.gpu and hardware.gpu.verified != "cited":
        text += f"\ncapacity of {hardware.gpu.name} is {hardware.gpu.verified}: {hardware.gpu.source}"
    return text


def _micro_batches(forecast: Forecast) -> int:
    recipe = forecast.recipe
    return int(recipe.batch) // (forecast.hardware.ranks * int(recipe.levers.micro_batch))


def _table(forecast: Forecast) -> list[str]:
    """One row a part, one column a kind of state, in GiB on the worst rank."""
    shown = [term for term in forecast.ledger.at(states_place(forecast.hardware)) if term.part not in NO_STATES]
    columns = [name for name in COLUMNS if _column(shown, name)]
    head = ["part", "trained", "parameters", "trainable", *columns, "total"]
    parts = list(dict.fromkeys([*forecast.trainable, *(term.part for term in shown)]))
    rows = [head]
    for part in parts:
        rows.append(_row(forecast, part, [term for term in shown if term.part == part], columns))
    rows.append(_row(forecast, "all", shown, columns))
    return _aligned(rows) + _elsewhere(forecast)


def _peaks(forecast: Forecast) -> list[str]:
    """What lives at the peak of each phase: states first, then what the trace adds."""
    terms = forecast.ledger.at(states_place(forecast.hardware))
    rows = [["at the peak of", "", *PEAK_PHASES]]
    kinds = {"states": [term for term in terms if term.part not in NO_STATES]}
    for name in ("batch", "activations", "transient", "gradients.so_far", "rounding"):
        kinds[name.replace(".", " ").replace("_", " ")] = [
            term for term in terms if term.part in NO_STATES and term.id.startswith(name)
        ]
    kinds["all"] = list(terms)
    for name, members in kinds.items():
        sizes = [sum(term.bytes for term in members if phase in term.alive) for phase in PEAK_PHASES]
        if any(sizes):
            rows.append([name, "", *(gib(size) if size else "-" for size in sizes)])
    return _aligned(rows)


def _elsewhere(forecast: Forecast) -> list[str]:
    """States that are not where the table looks, such as paged ones in host memory."""
    place = states_place(forecast.hardware)
    terms = [term for term in forecast.ledger.terms if term.place != place and term.part not in NO_STATES]
    return [f"in {term.place} memory: {term.name} {gib(term.bytes)}" for term in terms]


def _row(forecast: Forecast, part: str, terms: Sequence[Term], columns: Sequence[str]) -> list[str]:
    trainable = sum(forecast.trainable.values()) if part == "all" else forecast.trainable.get(part, 0)
    frozen = sum(forecast.frozen.values()) if part == "all" else forecast.frozen.get(part, 0)
    mode = _mode(forecast.recipe, part)
    cells = [gib(size) if (size := _column(terms, name)) else "-" for name in columns]
    counts = [count_text(trainable + frozen), count_text(trainable)] if trainable + frozen else ["-", "-"]
    return [part, mode, *counts, *cells, gib(sum(term.bytes for term in terms))]


def _mode(recipe: Recipe, part: str) -> str:
    return {str(name): mode for name, mode in recipe.parts.items()}.get(part, "")


def _column(terms: Sequence[Term], name: str) -> int:
    return sum(term.bytes for term in terms if set(term.id.split(".")) & set(COLUMNS[name]))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(len(line) for line in lines)
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]


def _phases(forecast: Forecast) -> list[str]:
    sizes = forecast.ledger.phase_bytes(states_place(forecast.hardware))
    return ["states alive in each phase:", "  " + ", ".join(f"{name} {gib(sizes[name])}" for name in PHASES)]
