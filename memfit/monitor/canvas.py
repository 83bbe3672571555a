"""A drawing as a list of rectangles, shapes, lines and texts, written as SVG or, through Pillow, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
INK, FAINT, PAPER = "#222222", "#d9d9d9", "#ffffff"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', Arial, sans-serif"
SHARPER = 2  # pixels of a PNG for one unit of the drawing
ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}
# Mean width of a letter of a sans-serif font, in font sizes: for deciding what fits, not for placing.
LETTER = 0.56


@dataclass(frozen=True)
class Shape:
    """A filled polygon."""

    points: tuple[Point, ...]
    fill: str


@dataclass(frozen=True)
class Line:
    """A line through points; `dash` is (drawn, left out) in units."""

    points: tuple[Point, ...]
    colour: str = INK
    width: float = 1.0
    dash: tuple[float, float] | None = None


@dataclass(frozen=True)
class Text:
    """One line of text; `at` is its base line's start, middle or end."""

    at: Point
    text: str
    size: float = 13.0
    anchor: str = "start"
    colour: str = INK
    bold: bool = False


@dataclass
class Canvas:
    """What is drawn, from back to front. `about` is the alternative text."""

    width: int
    height: int
    about: str = ""
    items: list[Shape | Line | Text] = field(default_factory=list)

    def rectangle(self, corner: Point, width: float, height: float, fill: str) -> None:
        """A filled rectangle from its upper left corner."""
        x, y = corner
        self.items.append(Shape(((x, y), (x + width, y), (x + width, y + height), (x, y + height)), fill))

    def shape(self, points: Sequence[Point], fill: str) -> None:
        self.items.append(Shape(tuple(points), fill))

    def line(self, points: Sequence[Point], colour: str = INK, width: float = 1.0, dashed: bool = False) -> None:
        self.items.append(Line(tuple(points), colour, width, (7, 5) if dashed else None))

    def text(self, at: Point, text: str, size: float = 13.0, **how: str | bool) -> None:
        """`how`: anchor (start, middle, end), colour, bold."""
        self.items.append(Text(at, text, size, **how))  # type: ignore[arg-type]

    def svg(self) -> str:
        """The drawing as one SVG element."""
        body = "\n".join(_svg_item(item) for item in self.items)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" aria-label="{escape(self.about, quote=True)}" '
            f'font-family="{escape(FONT, quote=True)}">\n<rect width="100%" height="100%" fill="{PAPER}"/>\n'
            f"{body}\n</svg>\n"
        )

    def png(self, path: Path) -> None:
        """Write the drawing as a PNG file, `SHARPER` pixels a unit."""
        size = (self.width * SHARPER, self.height * SHARPER)
        image = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(image)
        for item in self.items:
            _draw(draw, item)
        image.save(path, format="PNG", optimize=True)


def text_width(text: str, size: float) -> float:
    """About how wide a text is, in units."""
    return len(text) * size * LETTER


def _svg_item(item: Shape | Line | Text) -> str:
    if isinstance(item, Shape):
        return f'<polygon points="{_points(item.points)}" fill="{item.fill}"/>'
    if isinstance(item, Line):
        dash = f' stroke-dasharray="{item.dash[0]} {item.dash[1]}"' if item.dash else ""
        stroke = f'stroke="{item.colour}" stroke-width="{item.width}"{dash}'
        return f'<polyline points="{_points(item.points)}" fill="none" {stroke}/>'
    x, y = item.at
    weight = ' font-weight="600"' if item.bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{item.size}" text-anchor="{item.anchor}" fill="{item.colour}"'
        f"{weight}>{escape(item.text)}</text>"
    )


def _points(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _draw(draw: ImageDraw.ImageDraw, item: Shape | Line | Text) -> None:
    if isinstance(item, Text):
        font = ImageFont.load_default(item.size * SHARPER)
        # Pillow's own font has no bold face: a thin outline of the same colour makes one.
        stroke = 0.5 if item.bold else 0
        draw.text(
            _scaled([item.at])[0],
            item.text,
            fill=item.colour,
            font=font,
            anchor=ANCHORS[item.anchor],
            stroke_width=stroke,
        )
        return
    points = _scaled(item.points)
    if isinstance(item, Shape):
        draw.polygon(points, fill=item.fill)
        return
    width = max(1, round(item.width * SHARPER))
    for start, end in pairwise(points):
        for a, b in _dashes(start, end, item.dash) if item.dash else [(start, end)]:
            draw.line([a, b], fill=item.colour, width=width)


def _dashes(start: Point, end: Point, dash: tuple[float, float]) -> list[tuple[Point, Point]]:
    length = ((end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2) ** 0.5
    on, period = dash[0] * SHARPER, sum(dash) * SHARPER
    found, at = [], 0.0
    while at < length:
        shares = at / length, min(at + on, length) / length
        first, last = ((start[0] + s * (end[0] - start[0]), start[1] + s * (end[1] - start[1])) for s in shares)
        found.append((first, last))
        at += period
    return found


def _scaled(points: Sequence[Point]) -> list[Point]:
    return [(x * SHARPER, y * SHARPER) for x, y in points]
