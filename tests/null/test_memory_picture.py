"""The picture of a forecast: its heights are the ledger's bytes, and it is written as what the suffix says."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from memfit.errors import UserError
from memfit.monitor.canvas import Canvas, Shape, Text
from memfit.monitor.memory_picture import COLOURS, draw, write_picture
from memfit.planner.groups import GROUPS, group_of
from memfit.specs.plan import Forecast
from memfit.units import GIB, gib
from tests.null.test_difference import run


def texts(canvas: Canvas) -> list[str]:
    return [item.text for item in canvas.items if isinstance(item, Text)]


def colours(canvas: Canvas) -> set[str]:
    return {item.fill for item in canvas.items if isinstance(item, Shape)}


def test_every_phase_shows_its_sum() -> None:
    forecast = run()
    found = texts(draw([forecast], ["a run"]))
    for phase in ("load", "forward", "loss", "backward", "step"):
        terms = [term for term in forecast.ledger.terms if phase in term.alive]
        assert gib(sum(term.bytes for term in terms)) in found, phase
        assert phase in found
    assert "RTX4090: 23.64 GiB" in found


def test_heights_are_in_proportion() -> None:
    """Temporaries of 2 GiB stand twice as high as activations of 1 GiB."""
    canvas = draw([run(saved=GIB, transient=2 * GIB)], ["a run"])

    def heights(group: str) -> list[float]:
        shapes = [item for item in canvas.items if isinstance(item, Shape) and item.fill == COLOURS[group][0]]
        bars = [item for item in shapes if len(item.points) == 4]
        tall = [max(y for _, y in bar.points) - min(y for _, y in bar.points) for bar in bars]
        return [height for height in tall if height > 14.5]  # without the legend's squares

    assert heights("temporaries")[0] == pytest.approx(2 * heights("activations")[0], rel=1e-6)


def test_the_timeline_peaks_where_the_bars_do() -> None:
    """The course of a step ends, at its highest, at the level of what is allocated in the binding phase."""
    canvas = draw([run()], ["a run"])
    areas = [item for item in canvas.items if isinstance(item, Shape) and len(item.points) > 4]
    top = min(y for area in areas for _, y in area.points)
    low = max(y for area in areas for _, y in area.points)
    labels = [item for item in canvas.items if isinstance(item, Text)]
    # Two marks of the vertical axis of the second panel give its scale.
    marks = [item for item in labels if item.anchor == "end" and item.at[1] > low - 320 and item.at[1] < low + 10]
    (y0, v0), (y1, v1) = [(mark.at[1], float(mark.text)) for mark in (marks[0], marks[-1])]
    allocated = max(
        sum(t.bytes for t in run().ledger.at("gpu") if phase in t.alive and t.part != "allocator")
        for phase in ("forward", "loss", "backward", "step")
    )
    level = v0 + (top + 4.5 - y0) * (v1 - v0) / (y1 - y0)
    assert level == pytest.approx(allocated / GIB, rel=0.01)


def test_nothing_stands_outside() -> None:
    for forecasts in ([run()], [run(), run(method="lora", saved=3 * GIB)], [run(saved=40 * GIB)], [run(saved=None)]):
        canvas = draw(
            forecasts, ["a run with a name that is much longer than the picture is wide " * 4] * len(forecasts)
        )
        for item in canvas.items:
            points = [item.at] if isinstance(item, Text) else item.points
            assert all(0 <= x <= canvas.width and 0 <= y <= canvas.height for x, y in points), item
            if isinstance(item, Text):
                assert item.at[0] + (len(item.text) * item.size * 0.56 if item.anchor == "start" else 0) <= 1200, item


def test_a_card_much_larger_than_the_run_is_named_not_drawn() -> None:
    found = texts(draw([run(saved=MIB_64)], ["small"]))
    assert "(above this picture)" in found


MIB_64 = 64 << 20


def test_every_term_has_a_group() -> None:
    groups = {group_of(term) for term in run(method="lora").ledger.terms}
    assert groups <= set(GROUPS)
    assert {"weights", "optimizer states", "gradients", "activations", "temporaries", "batch", "context"} <= groups


def test_colours_can_be_told_apart() -> None:
    assert set(COLOURS) == set(GROUPS)
    assert len({colour for colour, _ in COLOURS.values()}) == len(COLOURS)
    assert {COLOURS["activations"][0], COLOURS["temporaries"][0]} <= colours(draw([run()], ["a"]))


@pytest.mark.parametrize("suffix", [".svg", ".html", ".png"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = write_picture([run()], ["a <run>"], tmp_path / f"picture{suffix}")
    if suffix == ".png":
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > 2000
            assert len(image.convert("RGB").getcolors(1 << 24) or ()) > len(GROUPS)
        return
    text = path.read_text(encoding="utf-8")
    svg = text if suffix == ".svg" else text[text.index("<svg") : text.index("</svg>") + 6]
    ElementTree.fromstring(svg)
    assert "a &lt;run&gt;" in text
    assert not re.search(r"https?://(?!www\.w3\.org)", text)


def test_refusals(tmp_path: Path) -> None:
    forecast: Forecast = run()
    with pytest.raises(UserError, match=r"name it picture\.svg"):
        write_picture([forecast], ["a"], tmp_path / "picture.pdf")
    with pytest.raises(UserError, match="cannot be written"):
        write_picture([forecast], ["a"], tmp_path / "no" / "picture.svg")
