"""The picture of a plan: memory against speed of every combination that was searched, and the ranked plans as bars.

Shapes tell the tiers, colours what became of a combination; both are told apart without colour vision, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memfit.monitor.canvas import FAINT, INK, PAPER, Canvas, Point, text_width
from memfit.monitor.charts import log_ticks, nice_ticks
from memfit.monitor.memory_picture import COLOURS, GREY
from memfit.monitor.picture_file import check_picture, page_of, write_canvas
from memfit.monitor.sweep_picture import draw_sweep, sweep_height
from memfit.planner.plan_text import plan_text, summary
from memfit.planner.sweep_text import LEDGER, ledger_of, verdict_text
from memfit.specs.plan import Forecast, Plan
from memfit.specs.search import Point as Searched
from memfit.specs.search import SearchResult
from memfit.units import GIB, MIB, duration, gib

WIDTH, HEAD, PANEL, FOOT, BAR, TOP_OF_BARS = 1160, 92, 430, 104, 46, 34
LEFT, RIGHT = 84, 232
# State -> colour, name. Okabe and Ito's again.
STATES = {
    "fits": ("#009E73", "fits"),
    "offered": ("#E69F00", "fits, may not be taken"),
    "untried": ("#8A8A8A", "not looked at"),
    "gpu": ("#D55E00", "does not fit the GPU"),
    "host": ("#CC79A7", "does not fit host memory"),
}
SHAPES = {1: "circle", 2: "square", 3: "triangle"}
NEAR = 2.5  # times the largest: a capacity beyond it is told, not drawn
FURTHEST = 3.0  # times the capacity: what takes more is counted, not drawn
LOG_FROM = 4.0  # slowest over fastest from which seconds stand on a logarithmic scale


@dataclass(frozen=True)
class _Scale:
    """Bytes to the right, seconds upwards."""

    top: float
    most: float
    low: float
    high: float

    def x(self, size: float) -> float:
        return LEFT + (WIDTH - RIGHT - LEFT) * size / self.most

    def y(self, seconds: float) -> float:
        if self.log:
            share = (math.log(seconds) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (seconds - self.low) / (self.high - self.low)
        return self.top + PANEL * (1 - share)

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high > LOG_FROM * self.low


def write_plan_picture(result: SearchResult, name: str, path: Path) -> Path:
    """Write the picture; the suffix gives the format. UserError as `memfit.monitor.picture_file.write_canvas`."""
    check_picture(path)
    canvas = draw_plan(result, name)
    return write_canvas(canvas, path, lambda: page_of(canvas, f"memfit plan: {name}", [(name, plan_text(result))]))


def draw_plan(result: SearchResult, name: str) -> Canvas:
    """Head, frontier, bars, and the sweep where there is one."""
    bars = TOP_OF_BARS + (BAR + 26) * len(result.ranked) + FOOT if result.ranked else 0
    swept = sweep_height(result.sweep) if result.sweep else 0
    height = HEAD + PANEL + FOOT + bars + swept
    canvas = Canvas(WIDTH, height, about=f"{name}: {plan_text(result).splitlines()[0]}")
    canvas.text((24, 32), _cut(name, 17, WIDTH - 48), 17, bold=True)
    for place, line in enumerate(_wrapped(plan_text(result).splitlines()[0], 13, WIDTH - 48)[:2]):
        canvas.text((24, 53 + 18 * place), line, 13, colour=GREY)
    if result.points:
        _frontier(canvas, result)
    if result.ranked:
        _bars(canvas, result, HEAD + PANEL + FOOT)
    if result.sweep:
        draw_sweep(canvas, result.sweep, HEAD + PANEL + FOOT + bars)
    return canvas


# ---- memory against speed --------------------------------------------------------------------------------------------


def _frontier(canvas: Canvas, result: SearchResult) -> None:
    forecast = result.chosen.forecast if result.chosen else None
    on_gpu = result.points[0].gpu_bytes is not None
    capacity = result.capacity_bytes
    shown = [one for one in result.points if capacity is None or _size(one) <= FURTHEST * capacity]
    beyond = len(result.points) - len(shown)
    if not shown:
        canvas.text(
            (LEFT, HEAD + 40), f"all {beyond} combinations take more than {FURTHEST:.0f} times what is there", 13
        )
        return
    scale = _scale(shown, capacity)
    timed = result.timed
    _axes(canvas, scale, ("GiB a GPU" if on_gpu else "GiB of host memory a node", timed))
    order = {"untried": 0, "host": 1, "gpu": 1, "offered": 2, "fits": 3}
    for one in sorted(shown, key=lambda point: (order[_state(point)], -point.seconds)):
        _mark(canvas, (scale.x(_size(one)), scale.y(one.seconds)), one)
    edge = _edge([one for one in shown if one.state == "fits" and not one.why])
    if len(edge) > 1:
        canvas.line([(scale.x(size), scale.y(seconds)) for size, seconds in edge], STATES["fits"][0], 2)
    if capacity is not None:
        _capacity(canvas, scale, capacity)
    if forecast is not None and result.ranked:
        best = min((one for one in shown if one.state == "fits" and not one.why), key=_rank, default=None)
        if best is not None:
            _chosen(canvas, scale, best)
    _legend(canvas, shown, beyond)


def _capacity(canvas: Canvas, scale: _Scale, capacity: int) -> None:
    """The line of what there is, or words where it stands beyond the picture."""
    text = gib(capacity)
    if capacity > scale.most:
        text = f"there are {text}, beyond this picture"
        canvas.text((WIDTH - RIGHT, scale.top - 10), text, 13, anchor="end", bold=True)
        return
    x = scale.x(capacity)
    canvas.line([(x, scale.top), (x, scale.top + PANEL)], INK, 2, dashed=True)
    at, anchor = (x + 6, "start") if x + 12 + text_width(text, 14) < WIDTH - RIGHT else (x - 6, "end")
    canvas.text((at, scale.top + 14), text, 13, anchor=anchor, bold=True)


def _rank(point: Searched) -> tuple[int, float]:
    return point.tier, point.seconds


def _size(point: Searched) -> int:
    return point.host_bytes if point.gpu_bytes is None else point.gpu_bytes


def _state(point: Searched) -> str:
    if point.state == "refused":
        return point.place
    return "offered" if point.state == "fits" and point.why else point.state


def _scale(shown: Sequence[Searched], capacity: int | None) -> _Scale:
    largest = max(_size(one) for one in shown)
    # A card much larger than all that was searched would press them together: its end is then told, not drawn.
    most = max(largest, capacity if capacity is not None and capacity <= NEAR * largest else 0) * 1.04
    seconds = [one.seconds for one in shown]
    low, high = min(seconds), max(seconds)
    if low > 0 and high > LOG_FROM * low:
        return _Scale(HEAD + 22, most, low / 1.1, high * 1.1)
    room = (high - low) * 0.08 or high * 0.1 or 1.0
    return _Scale(HEAD + 22, most, max(0.0, low - room), high + room)


def _axes(canvas: Canvas, scale: _Scale, words: tuple[str, bool]) -> None:
    across, timed = words
    title = "seconds a step" if timed else "order of work: no rates are known for this hardware"
    canvas.text((24, scale.top - 10), title + (", logarithmic scale" if scale.log else ""), 13, bold=True)
    for tick in log_ticks(scale.low, scale.high) if scale.log else nice_ticks(scale.low, scale.high, 6):
        y = scale.y(tick)
        canvas.line([(LEFT, y), (WIDTH - RIGHT, y)], FAINT, 1)
        if timed:
            canvas.text((LEFT - 8, y + 4.5), duration(tick) if tick else "0", 12, anchor="end", colour=GREY)
    unit = GIB if scale.most >= GIB else MIB
    for tick in nice_ticks(0, scale.most / unit, 9):
        x = scale.x(tick * unit)
        canvas.line([(x, scale.top), (x, scale.top + PANEL)], FAINT, 1)
        canvas.text((x, scale.top + PANEL + 18), f"{tick:,.10g}", 12, anchor="middle", colour=GREY)
    name = across if unit == GIB else across.replace("GiB", "MiB")
    canvas.text(((LEFT + WIDTH - RIGHT) / 2, scale.top + PANEL + 38), name, 13, anchor="middle", bold=True)


def _edge(fits: Sequence[Searched]) -> list[tuple[int, float]]:
    """The frontier: of what fits, whatever nothing else beats in both memory and speed."""
    best: list[tuple[int, float]] = []
    for one in sorted(fits, key=lambda point: (_size(point), point.seconds)):
        if not best or one.seconds < best[-1][1]:
            best.append((_size(one), one.seconds))
    return best


def _mark(canvas: Canvas, at: Point, point: Searched) -> None:
    colour = STATES[_state(point)][0]
    outline = _outline(at, point.tier, 6.0 if point.state == "fits" else 4.2)
    if point.exact:
        canvas.shape(outline, colour)
    else:
        canvas.line([*outline, outline[0]], colour, 1)


def _outline(at: Point, tier: int, radius: float) -> list[Point]:
    corners, turn = {"circle": (14, 0.0), "square": (4, math.pi / 4), "triangle": (3, -math.pi / 2)}[SHAPES[tier]]
    size = radius * {"circle": 1.0, "square": 1.25, "triangle": 1.4}[SHAPES[tier]]
    angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
    return [(at[0] + size * math.cos(angle), at[1] + size * math.sin(angle)) for angle in angles]


def _chosen(canvas: Canvas, scale: _Scale, point: Searched) -> None:
    x, y = scale.x(_size(point)), scale.y(point.seconds)
    ring = [(x + 12 * math.cos(a / 3), y + 12 * math.sin(a / 3)) for a in range(19)]
    canvas.line([*ring, ring[0]], INK, 2)
    wide = text_width("chosen", 14)
    below = y - scale.top < 34
    canvas.rectangle((x - wide / 2, y + 15 if below else y - 31), wide, 17, PAPER)
    canvas.text((x, y + 28 if below else y - 18), "chosen", 14, anchor="middle", bold=True)


def _legend(canvas: Canvas, shown: Sequence[Searched], beyond: int) -> None:
    left, y = WIDTH - RIGHT + 18, HEAD + 36
    for state, (colour, name) in STATES.items():
        count = sum(_state(one) == state for one in shown)
        if count:
            canvas.shape(_outline((left + 6, y - 4), 1, 5), colour)
            canvas.text((left + 20, y), f"{name} ({count:,})", 12)
            y += 20
    y += 8
    for tier in sorted({one.tier for one in shown}):
        canvas.line([*(outline := _outline((left + 6, y - 4), tier, 5)), outline[0]], INK, 1)
        canvas.text((left + 20, y), ("", "tier 1: same result", "tier 2: rounding", "tier 3: learning")[tier], 12)
        y += 20
    if any(not one.exact for one in shown):
        canvas.text((left, y + 8), "hollow: a lower bound", 12, colour=GREY)
        y += 20
    if beyond:
        canvas.text((left, y + 8), f"{beyond:,} more to the right", 12, colour=GREY)


# ---- the ranked plans as bars ----------------------------------------------------------------------------------------


def _bars(canvas: Canvas, result: SearchResult, top: float) -> None:
    """One bar a plan: what its peak is made of, to the card's capacity."""
    ledgers = [ledger_of(plan.forecast) for plan in result.ranked]
    most = max((sum(one.values()) for one in ledgers), default=0)
    capacity = result.capacity_bytes
    scale = max(most, capacity or 0 if (capacity or 0) <= 2.5 * most else most) * 1.02 or 1
    on_gpu = result.ranked[0].forecast.hardware.gpu is not None
    canvas.text(
        (24, top),
        f"The plans that fit, fastest first: GiB {'a GPU' if on_gpu else 'a node'} at the peak",
        14,
        bold=True,
    )
    right, y = WIDTH - RIGHT, top + TOP_OF_BARS

    def x(size: float) -> float:
        return LEFT + (right - LEFT) * size / scale

    for number, (plan, ledger) in enumerate(zip(result.ranked, ledgers, strict=True), 1):
        canvas.text((24, y), _cut(f"{number}  {summary(plan.forecast)}", 13, right - 24), 13, bold=number == 1)
        _bar(canvas, ledger, y + 8, x)
        for place, text in enumerate(_figures(plan)):
            canvas.text((right + 18, y + 19 + 16 * place), text, 12, bold=place == 0)
        y += BAR + 26
    if capacity is not None and capacity <= scale:
        canvas.line([(x(capacity), top + TOP_OF_BARS - 4), (x(capacity), y - 24)], INK, 2, dashed=True)
    left, used = 24.0, [group for group in LEDGER if any(ledger.get(group) for ledger in ledgers)]
    for group in used:
        canvas.rectangle((left, y - 10), 14, 14, COLOURS[group][0])
        canvas.text((left + 20, y + 2), LEDGER[group], 13)
        left += 40 + text_width(LEDGER[group], 13)
    if capacity is not None:
        if left + 260 > WIDTH:
            left, y = 24.0, y + 24
        canvas.line([(left, y - 3), (left + 18, y - 3)], INK, 2, dashed=capacity <= scale)
        where = "" if capacity <= scale else ", beyond this picture"
        canvas.text((left + 24, y + 2), f"{gib(capacity)}{where}", 13, bold=True)


def _bar(canvas: Canvas, ledger: dict[str, int], top: float, x: Callable[[float], float]) -> None:
    level = 0
    for group, size in ledger.items():
        left, right = x(level), x(level + size)
        colour, ink = COLOURS[group]
        canvas.rectangle((left, top), right - left, BAR - 18, colour)
        text = f"{size / GIB:,.1f}" if size >= GIB / 10 else f"{size / MIB:,.0f} M"
        if right - left > text_width(text, 12) + 6:
            canvas.text(((left + right) / 2, top + 19), text, 12, anchor="middle", colour=ink)
        level += size


def _figures(plan: Plan) -> Iterator[str]:
    forecast: Forecast = plan.forecast
    yield gib(sum(ledger_of(forecast).values())) + (
        f", {duration(forecast.speed.step_seconds)}" if forecast.speed else ""
    )
    if forecast.hardware.gpu is not None and forecast.node is not None:
        yield f"host {gib(forecast.node.peak_bytes)}, tier {plan.tier}"
    else:
        yield f"tier {plan.tier}"
    if forecast.verdict != "fits":
        yield verdict_text(forecast)


def _cut(text: str, size: float, room: float) -> str:
    limit = int(room / (size * 0.6))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _wrapped(text: str, size: float, room: float) -> list[str]:
    import textwrap

    return textwrap.wrap(text, int(room / (size * 0.56)))
