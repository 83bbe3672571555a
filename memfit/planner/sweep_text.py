"""A sweep for people and programs: a table of the ledger's parts, a small chart in letters, plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memfit.planner.activations import peak_of
from memfit.planner.estimate import capacity_bytes
from memfit.planner.estimate_text import aligned
from memfit.planner.groups import alive_at, group_sums
from memfit.planner.verdict import gpu_room, host_room, process_bytes
from memfit.specs.plan import Forecast
from memfit.specs.sweep import Sweep, SweepRow
from memfit.units import GIB, MIB, duration, gib

# Column of the table -> the groups of terms in it; `rest` is what is left of the total, so that a row adds up.
PIECES: Mapping[str, tuple[str, ...]] = {
    "weights": ("weights",),
    "optimizer": ("optimizer states",),
    "gradients": ("gradients",),
    "engine": ("engine",),
    "activations": ("batch", "activations", "temporaries"),
}
REST = "rest"
LETTERS = {"weights": "W", "optimizer": "O", "gradients": "G", "engine": "E", "activations": "A", REST: "."}
NARROWEST = 24  # characters of a bar


@dataclass(frozen=True)
class Pieces:
    """Bytes of one run where they bind: of a card with context and libraries, or of a node for CPU ranks. Their sum is
    `total`."""

    sizes: Mapping[str, int]
    total: int
    capacity: int | None


# Groups of terms as pictures show them, from what stays longest to what lies outside the model.
LEDGER: Mapping[str, str] = {
    "weights": "weights",
    "optimizer states": "optimizer states",
    "gradients": "gradients",
    "engine": "engine's buffers",
    "batch": "batch",
    "activations": "activations",
    "temporaries": "temporaries",
    "other": "other, processes",
    "allocator": "allocator's own",
    "context": "context, libraries",
}


def ledger_of(forecast: Forecast) -> dict[str, int]:
    """What a forecast takes where it binds, by group; adds up to the process on a card, or to a node. {} if unknown."""
    pieces, peak = pieces_of(forecast), peak_of(forecast)
    if pieces is None or peak is None:
        return {}
    on_gpu = forecast.hardware.gpu is not None
    sums = group_sums(alive_at(forecast, "gpu" if on_gpu else "host", peak[0]))
    outside = sum(term.bytes for term in forecast.ledger.terms if term.place in ("context", "comm"))
    sums["context"] += outside
    left = pieces.total - sum(sums.values())
    sums["allocator" if on_gpu else "other"] += left
    return {group: size for group in LEDGER if (size := sums[group]) > 0}


def pieces_of(forecast: Forecast) -> Pieces | None:
    """What a forecast takes at its peak, in pieces; None where the total is not forecast."""
    on_gpu, peak = forecast.hardware.gpu is not None, peak_of(forecast)
    total = process_bytes(forecast) if on_gpu else forecast.node.peak_bytes if forecast.node else None
    if total is None or peak is None:
        return None
    sums = group_sums(alive_at(forecast, "gpu" if on_gpu else "host", peak[0]))
    sizes = {name: sum(sums[group] for group in groups) for name, groups in PIECES.items()}
    return Pieces({**sizes, REST: total - sum(sizes.values())}, total, capacity_bytes(forecast.hardware))


def sweep_text(sweep: Sweep, width: int = 100) -> str:
    """The table, what is impossible, and the chart."""
    found = {index: pieces_of(row.forecast) for index, row in enumerate(sweep.rows) if row.forecast is not None}
    known = [one for one in found.values() if one is not None]
    most = max((one.total for one in known), default=0)
    unit, name = (GIB, "GiB") if most >= GIB / 2 else (MIB, "MiB")
    shown = [piece for piece in (*PIECES, REST) if any(one.sizes[piece] for one in known)]
    on_gpu = any(row.forecast and row.forecast.hardware.gpu for row in sweep.rows)
    head = ["", sweep.key.rpartition(".")[2], *(_short(piece) for piece in shown), *(["GPU"] if on_gpu else [])]
    rows = [[*head, "host", "a step", ""]]
    for index, row in enumerate(sweep.rows):
        rows.append(_cells(row, found.get(index), shown, unit) if row.forecast else _impossible(row, len(rows[0])))
    lines = [f"{sweep.key}, {name} {'a GPU' if on_gpu else 'a node'} at the peak, of {sweep.held}:", ""]
    lines += [line.removeprefix("  ") for line in aligned(rows, total=False)]
    lines += [f"  {row.value}: {row.problem}" for row in sweep.rows if row.forecast is None]
    if len(known) > 1 and len({one.total for one in known}) == 1:
        lines.append(f"  {sweep.key} moves nothing at the peak of this run")
    return "\n".join([*lines, "", *_chart(sweep, found, width)])


def sweep_json(sweep: Sweep) -> list[dict[str, Any]]:
    """One object a value: what it needs, by piece, and whether it fits; null where it is impossible, with `problem`."""
    return [_row_json(row) for row in sweep.rows]


def _row_json(row: SweepRow) -> dict[str, Any]:
    values: dict[str, Any] = {"value": row.value, "problem": row.problem or None}
    forecast = row.forecast
    if forecast is None:
        keys = ("verdict", "fits", "short_by_bytes", "short_in", "peak_phase", "bytes", "pieces", "host_bytes")
        return values | dict.fromkeys((*keys, "step_seconds"))
    pieces, peak, (short, place) = pieces_of(forecast), peak_of(forecast), _short_by(forecast)
    return values | {
        "verdict": forecast.verdict,
        "fits": forecast.fits,
        "short_by_bytes": short,
        "short_in": place or None,
        "peak_phase": peak[0] if peak else None,
        "bytes": pieces.total if pieces else None,
        "pieces": dict(pieces.sizes) if pieces else None,
        "host_bytes": forecast.node.peak_bytes if forecast.node else None,
        "step_seconds": forecast.speed.step_seconds if forecast.speed else None,
    }


def _short(piece: str) -> str:
    return {"activations": "activ.", "gradients": "grads", "optimizer": "optim."}.get(piece, piece)


def _impossible(row: SweepRow, count: int) -> list[str]:
    return ["", f"{row.value}", *["-"] * (count - 3), "impossible"]


def _cells(row: SweepRow, pieces: Pieces | None, shown: Sequence[str], unit: int) -> list[str]:
    forecast = row.forecast
    assert forecast is not None
    on_gpu = forecast.hardware.gpu is not None
    sizes = [_number(pieces.sizes[name], unit) if pieces else "-" for name in shown]
    total = [_number(pieces.total, unit) if pieces else "-"] if on_gpu else []
    host = _number(forecast.node.peak_bytes, unit) if forecast.node else "-"
    step = duration(forecast.speed.step_seconds) if forecast.speed else "-"
    return ["", f"{row.value}", *sizes, *total, host, step, verdict_text(forecast)]


def verdict_text(forecast: Forecast) -> str:
    """fits, borderline, or by how much it is short and where."""
    if forecast.fits is not False:
        return forecast.verdict
    short, place = _short_by(forecast)
    if not short:
        return "does not fit"
    return f"short {gib(short)}" + (" of host" if place == "host" and forecast.hardware.gpu else "")


def _short_by(forecast: Forecast) -> tuple[int, str]:
    rooms = [room for room in (gpu_room(forecast), host_room(forecast)) if room is not None and room.short]
    worst = max(rooms, key=lambda room: room.short, default=None)
    return (worst.short, worst.place) if worst else (0, "")


def _number(size: int, unit: int) -> str:
    return f"{size / unit:,.2f}" if size < 1000 * unit else f"{size / unit:,.0f}"


def _chart(sweep: Sweep, found: Mapping[int, Pieces | None], width: int) -> list[str]:
    """One bar of letters a value, in proportion, with the card's end where it is not far beyond all bars."""
    known = [one for one in found.values() if one is not None and one.total]
    if not known:
        return []
    most = max(one.total for one in known)
    capacity = next((one.capacity for one in known if one.capacity is not None), None)
    inside = capacity is not None and capacity <= 2 * most
    scale = max(most, capacity or 0) if inside else most
    label = max(len(str(row.value)) for row in sweep.rows)
    room = max(NARROWEST, min(width, 120) - label - 14)
    lines = []
    for index, row in enumerate(sweep.rows):
        pieces = found.get(index)
        bar = _bar(pieces, scale, room) if pieces else ""
        if inside and capacity is not None:
            at = min(room, round(room * capacity / scale))
            bar = f"{bar[:at].ljust(at)}|{bar[at:]}"
        size = gib(pieces.total) if pieces else ("impossible" if row.forecast is None else "not forecast")
        lines.append(f"{str(row.value).rjust(label)} {bar.rstrip()} {size}")
    used = [name for name in LETTERS if any(one.sizes[name] for one in known)]
    legend = ", ".join(f"{LETTERS[name]} {name}" for name in used)
    end = ""
    if capacity is not None:
        end = f"; | {gib(capacity)}, what there is" if inside else f"; there are {gib(capacity)}, beyond this chart"
    return [*lines, f"{legend}{end}"]


def _bar(pieces: Pieces, scale: int, room: int) -> str:
    """Letters of every piece; ends are rounded, so that pieces stay where they end and the whole is right."""
    text, level = "", 0
    for name in LETTERS:
        level += pieces.sizes[name]
        text += LETTERS[name] * max(0, round(room * level / scale) - len(text))
    return text
