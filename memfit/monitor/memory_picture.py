"""The picture of a forecast: what is alive at the peak of each phase as stacked bars, and the course of one step.

Colours are Okabe and Ito's, which people with any kind of colour vision can tell apart (jfly.uni-koeln.de/color).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from memfit.monitor.canvas import FAINT, INK, PAPER, Canvas, text_width
from memfit.monitor.charts import nice_ticks
from memfit.monitor.picture_file import check_picture, page_of, write_canvas
from memfit.planner.activations import known_phases
from memfit.planner.estimate import capacity_bytes, states_place
from memfit.planner.estimate_text import estimate_text
from memfit.planner.groups import GROUPS, alive_at, group_of, group_sums, is_state
from memfit.planner.verdict import process_bytes
from memfit.specs.ledger import PHASES, Term
from memfit.specs.plan import Forecast
from memfit.specs.trace import TRACED_PHASES, Moment
from memfit.units import GIB, gib

# Group of terms -> colour, colour of the text on it.
COLOURS: dict[str, tuple[str, str]] = {
    "weights": ("#0072B2", PAPER),
    "optimizer states": ("#56B4E9", INK),
    "gradients": ("#009E73", PAPER),
    "engine": ("#CC79A7", INK),
    "batch": ("#F0E442", INK),
    "activations": ("#E69F00", INK),
    "temporaries": ("#D55E00", PAPER),
    "other": ("#A0785A", PAPER),
    "allocator": ("#C4C4C4", INK),
    "context": ("#6E6E6E", PAPER),
}
TRACED = {"inputs": "batch", "saved": "activations", "transient": "temporaries", "gradients": "gradients"}
PLACES = {"gpu": ("gpu", "allocator", "context", "comm"), "host": ("host",)}

WIDTH, PANEL, HEAD, FOOT = 1160, 330, 136, 58
LEFT, RIGHT = 74, 190
GREY = "#5a5a5a"


@dataclass(frozen=True)
class _Frame:
    """Where one panel stands and how bytes become heights."""

    left: float
    right: float
    top: float
    bottom: float
    most: float

    def y(self, size: float) -> float:
        return self.bottom - (self.bottom - self.top) * size / self.most


def write_picture(forecasts: Sequence[Forecast], names: Sequence[str], path: Path) -> Path:
    """Write the picture of one forecast, or of several below each other on one scale. The suffix gives the format.

    Raises UserError for another suffix, a folder that is not there, and a file that cannot be written.
    """
    check_picture(path)
    canvas = draw(forecasts, names)
    texts = [(name, estimate_text(forecast)) for forecast, name in zip(forecasts, names, strict=True)]
    return write_canvas(canvas, path, lambda: page_of(canvas, f"memfit estimate: {', '.join(names)}", texts))


def draw(forecasts: Sequence[Forecast], names: Sequence[str]) -> Canvas:
    """The drawing: a head line, the bars and the timeline of every forecast."""
    most: float = max(_highest(forecast) for forecast in forecasts)
    capacities = [size for forecast in forecasts if (size := capacity_bytes(forecast.hardware)) is not None]
    # A card much larger than the run would press the bars flat: its line is then named, not drawn.
    most = max([most, *(size for size in capacities if size <= 2.5 * most)]) * 1.06
    heights = [HEAD + PANEL + (FOOT + PANEL if forecast.trace else 0) + FOOT for forecast in forecasts]
    canvas = Canvas(
        WIDTH, sum(heights) + 8, about="; ".join(_about(f, n) for f, n in zip(forecasts, names, strict=True))
    )
    top = 0.0
    for forecast, name, height in zip(forecasts, names, heights, strict=True):
        _head(canvas, forecast, name, top)
        first = top + HEAD
        _bars(canvas, forecast, _Frame(LEFT, WIDTH - RIGHT, first, first + PANEL, most))
        if forecast.trace is not None:
            second = first + PANEL + FOOT
            _timeline(canvas, forecast, _Frame(LEFT, WIDTH - RIGHT, second, second + PANEL, most))
        top += height
    return canvas


def _phase_names(forecast: Forecast) -> tuple[str, ...]:
    return known_phases(forecast) or PHASES


def _terms(forecast: Forecast, phase: str) -> list[Term]:
    places = PLACES[states_place(forecast.hardware)]
    return [term for place in places for term in alive_at(forecast, place, phase)]


def _highest(forecast: Forecast) -> int:
    return max(sum(term.bytes for term in _terms(forecast, phase)) for phase in _phase_names(forecast))


def _head(canvas: Canvas, forecast: Forecast, name: str, top: float) -> None:
    verdict = estimate_text(forecast).splitlines()[0].split("; ")
    recipe = forecast.recipe
    levers = f"{recipe.method}, {recipe.levers.precision}, {recipe.levers.parallel}, checkpointing {_mode(forecast)}"
    canvas.text((LEFT - 50, top + 30), _cut(name, 17, bold=True), 17, bold=True)
    for place, text in enumerate((*verdict[:2], f"{recipe.model} on {forecast.hardware.text}: {levers}")):
        canvas.text((LEFT - 50, top + 53 + 20 * place), _cut(text, 13), 13, colour=GREY)


def _mode(forecast: Forecast) -> str:
    mode = forecast.recipe.levers.checkpointing
    return ", ".join(f"{part} {value}" for part, value in mode.items()) if isinstance(mode, Mapping) else str(mode)


def _cut(text: str, size: float, bold: bool = False) -> str:
    limit = int((WIDTH - LEFT) / (size * (0.66 if bold else 0.6)))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _bars(canvas: Canvas, forecast: Forecast, frame: _Frame) -> None:
    _axis(canvas, frame, "GiB alive at the peak of each phase")
    phases = _phase_names(forecast)
    width = (frame.right - frame.left) / len(phases)
    sums = [group_sums(_terms(forecast, phase)) for phase in phases]
    _legend(canvas, forecast, frame, [group for group in reversed(GROUPS) if any(sizes[group] for sizes in sums)])
    for place, phase in enumerate(phases):
        left, bar = frame.left + (place + 0.16) * width, 0.68 * width
        level = 0.0
        for group, size in sums[place].items():
            if not size:
                continue
            colour, ink = COLOURS[group]
            high, low = frame.y(level + size), frame.y(level)
            canvas.rectangle((left, high), bar, low - high, colour)
            if low - high > 1.5:
                canvas.line([(left, high), (left + bar, high)], PAPER, 1)
            if low - high >= 15:
                canvas.text((left + bar / 2, (high + low) / 2 + 4.5), _number(size), 12, anchor="middle", colour=ink)
            level += size
        wide = text_width(gib(level), 14)
        canvas.rectangle((left + (bar - wide) / 2, frame.y(level) - 19), wide, 17, PAPER)  # so that no line crosses it
        canvas.text((left + bar / 2, frame.y(level) - 6), gib(level), 13, anchor="middle", bold=True)
        name = phase if forecast.trace is not None else f"{phase} (states)"
        canvas.text((left + bar / 2, frame.bottom + 19), name, 13, anchor="middle")


def _timeline(canvas: Canvas, forecast: Forecast, frame: _Frame) -> None:
    """Stacked areas of what is allocated over one step. Across: operators in their order, not time."""
    trace = forecast.trace
    assert trace is not None
    ranks = 1 if states_place(forecast.hardware) == "gpu" else forecast.hardware.gpus_per_node
    columns = _columns(forecast, trace.timeline, ranks)
    bands = _bands(columns, frame)
    for index, (phase, (left, right)) in enumerate(bands.items()):
        if index % 2:
            canvas.rectangle((left, frame.top), right - left, frame.bottom - frame.top, "#f3f3f3")
        canvas.text(((left + right) / 2, frame.bottom + 19), phase, 13, anchor="middle")
    _axis(canvas, frame, "GiB allocated over one step (across: operators in their order, not time)")
    used = [group for group in GROUPS if any(sums[group] for _, _, sums in columns)]
    for group in reversed(used):
        below = list(GROUPS)[: list(GROUPS).index(group) + 1]
        for phase, (left, right) in bands.items():
            own = [(share, sum(sums[name] for name in below)) for name, share, sums in columns if name == phase]
            edge = [(left + share * (right - left), frame.y(level)) for share, level in own]
            edge = [(left, edge[0][1]), *edge, (right, edge[-1][1])]
            canvas.shape([(left, frame.bottom), *edge, (right, frame.bottom)], COLOURS[group][0])
    for left, _ in list(bands.values())[1:]:
        canvas.line([(left, frame.top), (left, frame.bottom)], PAPER, 1)
    _legend(canvas, forecast, frame, list(reversed(used)))


Column = tuple[str, float, dict[str, int]]  # phase, place in the phase (0 to 1), bytes by group


def _columns(forecast: Forecast, timeline: Sequence[Moment], ranks: int) -> list[Column]:
    found: list[Column] = []
    stay = any(term.id.startswith("gradients.so_far.") for term in forecast.ledger.terms)
    for phase in TRACED_PHASES:
        # An engine's gathered weights and buffers stand at their level of the phase's peak: the trace has no events of
        # them.
        lasting = [t for t in _terms(forecast, phase) if is_state(t) or group_of(t) == "engine"]
        states = group_sums(lasting)
        own = [moment for moment in timeline if moment.phase == phase]
        # Engines that split gradients take them away as they come; the ledger has them among the engine's buffers.
        drawn = [kind for kind in TRACED if kind != "gradients" or stay]
        first, last = (own[0].at, own[-1].at) if own else (0, 0)
        for moment in own:
            sums = dict(states)
            for kind in drawn:
                sums[TRACED[kind]] += ranks * int(getattr(moment, kind))
            found.append((phase, (moment.at - first) / max(last - first, 1), sums))
    step = group_sums(term for term in _terms(forecast, "step") if term.part not in {"allocator", "process"})
    return [*found, ("step", 0.0, step), ("step", 1.0, step)]


def _bands(columns: Sequence[Column], frame: _Frame) -> dict[str, tuple[float, float]]:
    """Phase -> (left, right): by its number of columns, none narrower than its name."""
    counts: dict[str, int] = {}
    for phase, _, _ in columns:
        counts[phase] = counts.get(phase, 0) + 1
    least = {phase: text_width(phase, 13) + 26 for phase in counts}
    room = frame.right - frame.left - sum(least.values())
    at, bands = frame.left, {}
    for phase, count in counts.items():
        width = least[phase] + room * count / len(columns)
        bands[phase] = (at, at + width)
        at += width
    return bands


def _axis(canvas: Canvas, frame: _Frame, title: str) -> None:
    canvas.text((frame.left - 50, frame.top - 10), title, 13, bold=True)
    ticks = nice_ticks(0, frame.most / GIB, 6)
    digits = 0 if all(tick == int(tick) for tick in ticks) else 1 if min(ticks[1:] or [1]) >= 0.1 else 2
    for tick in ticks:
        y = frame.y(tick * GIB)
        canvas.line([(frame.left, y), (frame.right, y)], FAINT, 1)
        canvas.text((frame.left - 8, y + 4.5), f"{tick:,.{digits}f}", 12, anchor="end", colour=GREY)


def _legend(canvas: Canvas, forecast: Forecast, frame: _Frame, groups: Sequence[str]) -> None:
    """The capacity's line and name, then the groups in the order of the bars."""
    y, left = frame.top + 14, frame.right + 14
    capacity = capacity_bytes(forecast.hardware)
    if capacity is not None:
        what = forecast.hardware.gpu.name if forecast.hardware.gpu else "the node"
        inside = capacity <= frame.most
        if inside:
            level = frame.y(capacity)
            canvas.line([(frame.left, level), (frame.right, level)], INK, 2, dashed=True)
            canvas.line([(left, y - 5), (left + 18, y - 5)], INK, 2, dashed=True)
        canvas.text((left + 23, y), f"{what}: {gib(capacity)}", 13, bold=True)
        if not inside:
            canvas.text((left + 23, y + 17), "(above this picture)", 12, colour=GREY)
            y += 17
        y += 28
    for place, group in enumerate(groups):
        at = y + 22 * place
        canvas.rectangle((left + 2, at - 11), 14, 14, COLOURS[group][0])
        canvas.text((left + 23, at + 1), _named(group), 13)


def _named(group: str) -> str:
    names = {"allocator": "allocator's own", "context": "context, libraries", "engine": "engine's buffers"}
    return names.get(group, group)


def _number(size: int) -> str:
    return f"{size / GIB:,.1f}" if size >= GIB else f"{size / GIB:,.2f}"


def _about(forecast: Forecast, name: str) -> str:
    phases = ", ".join(
        f"{phase} {gib(sum(t.bytes for t in _terms(forecast, phase)))}" for phase in _phase_names(forecast)
    )
    process = process_bytes(forecast)
    return f"{name}: memory by phase: {phases}" + (f"; the process {gib(process)}" if process else "")
