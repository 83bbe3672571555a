"""Small line charts as inline SVG. Colours come from the page's style, so that light and dark both work.

A chart is drawn once, about as wide as a phone; a page puts two beside each other where there is room. Lines carry
their name at their end instead of a legend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 74, 14, 34
MAX_POINTS = 300  # more would be closer together than a pixel
LOG_RANGE = 30  # values that span more than this factor are shown on a logarithmic scale

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line; `colour` is an index into the page's palette, `style` one of line, faint (no name), dots."""

    name: str
    points: tuple[Point, ...]
    colour: int = 0
    style: str = "line"


@dataclass(frozen=True)
class Chart:
    """What is drawn. `zero` starts the vertical axis at 0; `log` may switch it to a logarithmic scale.

    Marks on the axis are round in multiples of `unit` (2**30 for bytes in GiB).
    """

    title: str
    series: tuple[Series, ...]
    text: Callable[[float], str]
    x_name: str = "step"
    zero: bool = False
    log: bool = False
    unit: float = 1.0


def smooth(points: Sequence[Point], window: int) -> tuple[Point, ...]:
    """The running mean over `window` points around each one, fewer at the ends."""
    half, sums = window // 2, [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    found = []
    for place, (x, _) in enumerate(points):
        low, high = max(0, place - half), min(len(points), place + half + 1)
        found.append((x, (sums[high] - sums[low]) / (high - low)))
    return tuple(found)


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> tuple[Point, ...]:
    """At most `limit` points, each the mean of its neighbours: no spike is picked by chance."""
    if len(points) <= limit:
        return tuple(points)
    found = []
    for place in range(limit):
        part = points[place * len(points) // limit : (place + 1) * len(points) // limit]
        found.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return tuple(found)


def svg(chart: Chart) -> str:
    """The chart as an SVG element with its content as alternative text; empty where there is nothing to draw."""
    series = [_finite(row) for row in chart.series]
    series = [row for row in series if row.points]
    if not series:
        return ""
    values = [y for row in series for _, y in row.points]
    steps = [x for row in series for x, _ in row.points]
    log = chart.log and min(values) > 0 and max(values) > LOG_RANGE * min(values)
    scale = _Scale((min(steps), max(steps)), _range(values, chart.zero, log), log)
    body = [*_grid(chart, scale), *(_draw(row, scale) for row in series), *_names(series, scale)]
    about = f"{chart.title}: " + "; ".join(
        f"{row.name} from {chart.text(row.points[0][1])} to {chart.text(row.points[-1][1])}"
        for row in series
        if row.style != "faint"
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about, quote=True)}">'
        + "".join(body)
        + "</svg>"
    )


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that cover low to high: 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * place, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between low and high, with 2 and 5 times them where there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(decades) > 4 else (1, 2, 5) if len(decades) < 3 else (1, 3)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


@dataclass(frozen=True)
class _Scale:
    steps: tuple[float, float]
    values: tuple[float, float]
    log: bool

    def x(self, value: float) -> float:
        low, high = self.steps
        share = (value - low) / (high - low) if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.values
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _finite(series: Series) -> Series:
    points = tuple((x, y) for x, y in series.points if math.isfinite(x) and math.isfinite(y))
    return Series(series.name, points, series.colour, series.style)


def _range(values: Sequence[float], zero: bool, log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.15, high * 1.15
    low = min(0.0, low) if zero else low
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if zero and low == 0 else low - room), high + room


def _grid(chart: Chart, scale: _Scale) -> list[str]:
    low, high = scale.values
    found = []
    ticks = [tick * chart.unit for tick in nice_ticks(low / chart.unit, high / chart.unit)]
    for tick in log_ticks(low, high) if scale.log else ticks:
        y = scale.y(tick)
        found.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        found.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_mark(chart.text(tick))}</text>'
        )
    for tick in nice_ticks(*scale.steps):
        place = f'x="{scale.x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}"'
        found.append(f'<text class="tick" {place} text-anchor="middle">{tick:,.0f}</text>')
    name = chart.x_name + (", logarithmic scale" if scale.log else "")
    found.append(f'<text class="axis" x="{LEFT}" y="{HEIGHT - 2}">{escape(name)}</text>')
    return found


def _draw(series: Series, scale: _Scale) -> str:
    places = [(scale.x(x), scale.y(y)) for x, y in series.points]
    colour = f"c{series.colour % 6}"
    if series.style == "dots" or len(places) == 1:
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places)
        line = _path(places, f"{colour} thin-line") if len(places) > 1 else ""
        return f'{line}<g class="dot {colour}">{dots}</g>'
    return _path(places, f"{colour} {series.style}")


def _path(places: Sequence[Point], names: str) -> str:
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return f'<path class="line {names}" d="M{steps}"/>'


def _names(series: Sequence[Series], scale: _Scale) -> list[str]:
    """Each line's name at its end, moved apart where they would overlap."""
    named = [row for row in series if row.style != "faint" and row.name]
    ends = [(scale.y(row.points[-1][1]), scale.x(row.points[-1][0]), row) for row in named]
    ends.sort(key=lambda end: end[0])
    found, last = [], -math.inf
    shift = max(0.0, ends[0][0] + 15 * (len(ends) - 1) - (HEIGHT - BOTTOM)) if ends else 0.0
    for y, x, row in ends:
        last = max(y - shift, last + 15)
        found.append(
            f'<text class="name c{row.colour % 6}" x="{x + 8:.1f}" y="{last + 4:.1f}">{escape(_short(row.name))}</text>'
        )
    return found


def _mark(text: str) -> str:
    return escape(text)


def _short(name: str, limit: int = 11) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
