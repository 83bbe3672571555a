"""A forecast for people: the verdict, a table by part, and what is missing. Readable without colour."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz import process

from memfit.errors import UserError
from memfit.physics.speed import TYPICAL_ERROR
from memfit.planner.activations import known_phases, peak_of
from memfit.planner.estimate import capacity_bytes, states_place
from memfit.planner.groups import alive_at, group_sums, is_state
from memfit.planner.host_terms import PROCESS_PART
from memfit.planner.problems import listed
from memfit.planner.verdict import Room, gpu_room, host_room, process_bytes
from memfit.specs.ledger import PHASES, Term
from memfit.specs.plan import Forecast
from memfit.specs.recipe import Recipe
from memfit.units import count_text, duration, gib

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
    notes = [f"note: {note}" for note in forecast.notes]
    lines = [_verdict(forecast), "", _run(forecast), *notes, "", *_table(forecast), ""]
    lines += _peaks(forecast) if forecast.trace is not None else _phases(forecast)
    lines += [*_node(forecast), *_speed(forecast), ""]
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
    count = len(forecast.defaults)
    defaults = f"{count} value{'s were defaults' if count != 1 else ' was a default'}, nothing was searched"
    tail = defaults if count else "every value was given"
    if forecast.trace is not None:
        figures = _on_gpu(forecast) if forecast.hardware.gpu else _on_cpu(forecast)
        return f"{forecast.verdict.replace('-', ' ')}{_host_binds(forecast)}: {figures}; {tail}"
    capacity = capacity_bytes(forecast.hardware)
    phase, size = _largest_phase(forecast)
    room = f", {'a GPU' if forecast.hardware.gpu else 'a node'} has {gib(capacity)}" if capacity is not None else ""
    states = f"states alone take {gib(size)} in the {phase} phase{room}"
    if forecast.verdict == "does-not-fit":
        return f"does not fit: {states}; {tail}"
    return f"unknown: {states}; activations are not forecast yet; {tail}"


def shortfall(forecast: Forecast) -> str:
    """What a forecast that does not fit needs, what there is, and what is missing; "" where no figure says so."""
    found = [room for room in (gpu_room(forecast), host_room(forecast)) if room is not None and room.short]
    names = {"gpu": "the GPU", "host": "host memory"}
    return "; ".join(f"{names[room.place]} peaks at {gib(room.needed)}{_of(room)}" for room in found)


def _on_gpu(forecast: Forecast) -> str:
    phase, size = peak_of(forecast) or ("", 0)
    process, reserved, found = process_bytes(forecast), forecast.reserved, gpu_room(forecast)
    if process is None or reserved is None:
        capacity = capacity_bytes(forecast.hardware)
        room = f", a GPU has {gib(capacity)}" if capacity is not None else ""
        return f"states and activations peak at {gib(size)}{_between(forecast)} in {phase}{room}, the process on top"
    out = "" if reserved.runs else ", where its allocator runs out of memory"
    return (
        f"the process peaks at {gib(process)}{_between(forecast)}{_of(found) if found else ''}{out}; "
        f"{gib(reserved.peak_reserved)} reserved, {gib(size)} allocated in {phase} (no GPU has confirmed this yet)"
    )


def _on_cpu(forecast: Forecast) -> str:
    """The node's memory, which the verdict rests on, and what of it the model itself takes."""
    phase, size = peak_of(forecast) or ("", 0)
    model = f"states and activations peak at {gib(size)}{_between(forecast)} in {phase}"
    node, found = forecast.node, host_room(forecast)
    if node is None:
        return f"{model}, the process on top"
    room = _of(found) if found else ", how much a node has is not known"
    return f"host memory of a node peaks at {gib(node.peak_bytes)}{room}; {model}"


def _of(room: Room) -> str:
    """What there is, and what is missing or how close it is."""
    text = f", {'a GPU' if room.place == 'gpu' else 'a node'} has {gib(room.capacity)}"
    return text + (f", short by {gib(room.short)}" if room.short else "")


def _host_binds(forecast: Forecast) -> str:
    """Beside the verdict of a GPU run: that it is the node's memory which is short, or may be."""
    room = host_room(forecast)
    if forecast.hardware.gpu is None or room is None:
        return ""
    if room.short:
        return f" (host memory: {gib(room.needed)} needed{_of(room)})"
    tight = forecast.verdict == "borderline" and room.high is not None and room.high > room.capacity
    return f" (host memory: up to {gib(room.high or 0)} needed{_of(room)})" if tight else ""


def _between(forecast: Forecast) -> str:
    found = forecast.interval
    if found and gib(found.low_bytes) == gib(found.high_bytes):
        return ""  # exact, as far as is shown
    return f" (90%: {gib(found.low_bytes).removesuffix(' GiB')} to {gib(found.high_bytes)})" if found else ""


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
    smaller = len(terms) - len(large)
    lines += [f"  {gib(rest)}  {smaller} smaller {'one' if smaller == 1 else 'ones'}"] if rest else []
    nvme = f"; {gib(node.nvme_bytes)} of states on NVMe" if node.nvme_bytes else ""
    return [*lines, f"disk: {gib(node.checkpoint_bytes)} for one checkpoint{nvme}"]


def _speed(forecast: Forecast) -> list[str]:
    speed = forecast.speed
    if speed is None:
        return []
    between = f"{duration(speed.low_seconds)} to {duration(speed.high_seconds)}"
    around = f" ({between}, by how much overlaps)" if speed.high_seconds > 1.01 * speed.low_seconds else ""
    return [
        f"speed: {duration(speed.step_seconds)} a step of worst micro-batches{around}, "
        f"{speed.tokens_per_second:,.0f} tokens/s, most of it {speed.bound} (published runs: half within "
        f"{100 * TYPICAL_ERROR:.0f}%)"
    ]


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
