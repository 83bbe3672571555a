"""A forecast for people: the verdict, a table by part, and what is missing. Readable without colour."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz import process

from memfit.errors import UserError
from memfit.planner.activations import known_phases, peak_of, process_bytes
from memfit.planner.estimate import capacity_bytes, states_place
from memfit.planner.groups import alive_at, group_sums, is_state
from memfit.planner.host_terms import PROCESS_PART
from memfit.planner.problems import listed
from memfit.specs.ledger import PHASES, Term
from memfit.specs.plan import Forecast
from memfit.specs.recipe import Recipe
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

# Host terms below this share of the node's peak are told as one line.
SMALL = 0.01


def estimate_text(forecast: Forecast) -> str:
    """The whole answer of `memfit estimate` as text: verdict, states by part, peaks by phase, host memory and disk."""
    lines = [_verdict(forecast), "", _run(forecast), "", *_table(forecast), ""]
    lines += _peaks(forecast) if forecast.trace is not None else _phases(forecast)
    lines += [*_node(forecast), ""]
    if forecast.ledger.missing:
        lines.append(f"not forecast yet: {', '.join(forecast.ledger.missing)}")
    lines.append(f"defaults taken: {', '.join(forecast.defaults) or 'none'}")
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
    host = _host_is_short(forecast)
    if host:
        verdict = f"{verdict} (host memory: {host})"
    found = forecast.interval
    between = f" (90%: {_between(found.low_bytes, found.high_bytes)})" if found else ""
    if process is None or reserved is None:
        return f"{verdict}: states and activations peak at {gib(size)}{between} in {phase}{room}, the process on top"
    short = "" if reserved.runs else ", where its allocator runs out of memory"
    return (
        f"{verdict}: the process peaks at {gib(process)}{between}{room}{short}; "
        f"{gib(reserved.peak_reserved)} reserved, {gib(size)} allocated in {phase} (no GPU has confirmed this yet)"
    )


def _between(low: int, high: int) -> str:
    return f"{gib(low).removesuffix(' GiB')} to {gib(high)}"


def _host_is_short(forecast: Forecast) -> str:
    node, capacity = forecast.node, forecast.hardware.host_memory_bytes
    if node is None or capacity is None or node.peak_bytes <= capacity:
        return ""
    return f"{gib(node.peak_bytes)} needed, a node has {gib(capacity)}"


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
    """One row a part, one column a kind of state: where the states are, and in host memory what has moved there."""
    place = states_place(forecast.hardware)
    lines = _states(forecast, place)
    if place == "gpu" and any(is_state(term) for term in forecast.ledger.at("host")):
        ranks = forecast.hardware.gpus_per_node
        lines += ["", f"in host memory of a node ({ranks} rank{'s' if ranks > 1 else ''}):", *_states(forecast, "host")]
    return lines


def _states(forecast: Forecast, place: str) -> list[str]:
    shown = [term for term in forecast.ledger.at(place) if is_state(term)]
    columns = [name for name in COLUMNS if _column(shown, name)]
    parts = list(dict.fromkeys([*forecast.trainable, *(term.part for term in shown)]))
    rows = [["part", "trained", "parameters", "trainable", *columns, "total"]]
    for part in parts:
        rows.append(_row(forecast, part, [term for term in shown if term.part == part], columns))
    rows.append(_row(forecast, "all", shown, columns))
    return aligned(rows)


def _peaks(forecast: Forecast) -> list[str]:
    """What lives at the peak of each phase, by group."""
    place, phases = states_place(forecast.hardware), known_phases(forecast)
    sums = {phase: group_sums(alive_at(forecast, place, phase)) for phase in phases}
    rows = [["at the peak of", "", *phases]]
    for group in next(iter(sums.values())):
        sizes = [sums[phase][group] for phase in phases]
        if any(sizes):
            name = {"engine": "engine's buffers", "allocator": "rounding to blocks"}.get(group, group)
            rows.append([name, "", *(gib(size) if size else "-" for size in sizes)])
    rows.append(["all", "", *(gib(sum(sums[phase].values())) for phase in phases)])
    return aligned(rows)


def _node(forecast: Forecast) -> list[str]:
    """Host memory of the fullest node and what a checkpoint takes on disk."""
    node, hardware = forecast.node, forecast.hardware
    if node is None:
        return []
    room = f", a node has {gib(hardware.host_memory_bytes)}" if hardware.host_memory_bytes is not None else ""
    locked = f", {gib(node.pinned_bytes)} of it page-locked" if node.pinned_bytes else ""
    lines = ["", f"host memory of a node: {gib(node.peak_bytes)} at its peak{locked}{room}"]
    terms = [term for term in forecast.ledger.at("host") if not is_state(term) and (hardware.gpu or _is_host(term))]
    large = [term for term in terms if term.bytes >= SMALL * node.peak_bytes]
    lines += [f"  {gib(term.bytes)}  {term.name} ({_alive(term)})" for term in sorted(large, key=lambda t: -t.bytes)]
    rest = sum(term.bytes for term in terms if term not in large)
    lines += [f"  {gib(rest)}  {len(terms) - len(large)} smaller ones"] if rest else []
    nvme = f"; {gib(node.nvme_bytes)} of states on NVMe" if node.nvme_bytes else ""
    return [*lines, f"disk: {gib(node.checkpoint_bytes)} for one checkpoint{nvme}"]


def _is_host(term: Term) -> bool:
    return term.part == PROCESS_PART


def _alive(term: Term) -> str:
    return "always" if set(term.alive) >= set(PHASES) - {"load"} else ", ".join(term.alive)


def _row(forecast: Forecast, part: str, terms: Sequence[Term], columns: Sequence[str]) -> list[str]:
    trainable = sum(forecast.trainable.values()) if part == "all" else forecast.trainable.get(part, 0)
    frozen = sum(forecast.frozen.values()) if part == "all" else forecast.frozen.get(part, 0)
    mode = _mode(forecast.recipe, part)
    cells = [gib(size) if (size := _column(terms, name)) else "-" for name in columns]
    counts = [count_text(trainable + frozen), count_text(trainable)] if trainable + frozen else ["-", "-"]
    return [part, mode, *counts, *cells, gib(size) if (size := sum(term.bytes for term in terms)) else "-"]


def _mode(recipe: Recipe, part: str) -> str:
    return {str(name): mode for name, mode in recipe.parts.items()}.get(part, "")


def _column(terms: Sequence[Term], name: str) -> int:
    return sum(term.bytes for term in terms if set(term.id.split(".")) & set(COLUMNS[name]))


def aligned(rows: Sequence[Sequence[str]], total: bool = True) -> list[str]:
    """Rows as lines in columns, the first two to the left; a rule below the head and, with `total`, above the end."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(len(line) for line in lines)
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]] if total else [lines[0], rule, *lines[1:]]


def _phases(forecast: Forecast) -> list[str]:
    sizes = forecast.ledger.phase_bytes(states_place(forecast.hardware))
    return ["states alive in each phase:", "  " + ", ".join(f"{name} {gib(sizes[name])}" for name in PHASES)]
