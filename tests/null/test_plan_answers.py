"""Around a plan, without torch: what is the longest, which values a sweep takes, the picture, and "why not?"."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from memfit.errors import UserError
from memfit.inputs.sweep_values import parse_sweep
from memfit.monitor.canvas import Canvas, Shape, Text
from memfit.monitor.plan_picture import STATES, draw_plan, write_plan_picture
from memfit.planner.answer import answer, file_json
from memfit.planner.longest import Grid, largest
from memfit.planner.plan_text import plan_text
from memfit.planner.sweep_text import ledger_of, pieces_of, sweep_json, sweep_text
from memfit.planner.why_not import why_not
from memfit.specs.recipe import Levers, Recipe
from memfit.specs.search import SearchResult
from memfit.specs.sweep import Sweep, SweepRow
from memfit.units import GIB, gib
from tests.null.test_difference import run
from tests.null.test_plan_search import hardware, search

# ---- the longest -----------------------------------------------------------------------------------------------------


def limit(most: int, slope: float = 1.0) -> Callable[[int], float]:
    return lambda value: slope * (most - value) + 0.5


@given(st.integers(0, 5000), st.integers(1, 5000), st.integers(0, 12000), st.sampled_from([1, 7, 64]))
def test_the_largest_is_what_trying_every_value_gives(low: int, wide: int, most: int, unit: int) -> None:
    grid = Grid(low, low + wide, unit)
    values = [low, *(v for v in range(low + 1, low + wide) if v % unit == 0), low + wide]
    wanted = max((value for value in values if value <= most), default=None)
    assert largest(limit(most), grid) == wanted
    assert largest(lambda value: 1.0 if value <= most else -1.0, grid) == wanted


def test_straight_lines_need_few_looks() -> None:
    looks = []

    def spare(value: int) -> float:
        looks.append(value)
        return 23e9 - 4e9 - 3.1e6 * value

    assert largest(spare, Grid(1024, 131_072, 64)) == 19e9 // 3.1e6 // 64 * 64
    assert len(looks) <= 8
    assert max(looks) < 131_072, "what is far too long is not tried"


def test_a_share_ends_the_search_sooner() -> None:
    found = largest(lambda value: 1.0 if value <= 10_000 else -1.0, Grid(64, 131_072, 64, 0.05))
    assert found is not None
    assert 9_500 <= found <= 10_000


# ---- the values of a sweep -------------------------------------------------------------------------------------------

SAID: list[tuple[str, list[Any]]] = [
    ("levers.micro_batch=1..4", [1, 2, 3, 4]),
    ("workload.tokens=512..8192", [512, 1024, 2048, 4096, 8192]),
    ("workload.tokens=1024..4096", [1024, 1536, 2048, 2560, 3072, 3584, 4096]),
    ("workload.tokens=100..1000..300", [100, 400, 700, 1000]),
    ("workload.tokens=4096,1024,4096", [4096, 1024]),
    ("workload.tokens=7..7", [7]),
    ("lora.dropout=0..0.4..0.2", [0.0, 0.2, 0.4]),
    ("levers.parallel=none,ddp", ["none", "ddp"]),
    ("workload.image_size=448x448..1344x1344..448", ["448x448", "896x896", "1344x1344"]),
    ("workload.image_size=448x224..896x224..448", ["448x224", "896x224"]),
    ("model_config.num_hidden_layers=2..4", [2, 3, 4]),
    ("hardware.host_memory=64GiB,128GiB", ["64GiB", "128GiB"]),
    ("max_length=1e3..2e3..1e3", [1000, 2000]),
]


@pytest.mark.parametrize(("text", "values"), SAID, ids=[text for text, _ in SAID])
def test_values_of_a_sweep(text: str, values: list[Any]) -> None:
    key, found = parse_sweep(text)
    assert key == text.partition("=")[0]
    assert list(found) == values


@settings(max_examples=30)
@given(st.integers(1, 100_000), st.integers(0, 200_000))
def test_a_range_has_few_values_and_both_ends(first: int, more: int) -> None:
    _, found = parse_sweep(f"workload.tokens={first}..{first + more}")
    assert (found[0], found[-1]) == (first, first + more)
    assert len(found) <= 19
    assert list(found) == sorted(found)


# ---- its table -------------------------------------------------------------------------------------------------------


def swept() -> Sweep:
    rows = [SweepRow(size, run(saved=size * GIB)) for size in (1, 4, 30)]
    return Sweep("workload.tokens", (*rows, SweepRow(64, None, "64 is too much")), "the chosen plan")


def test_pieces_add_up_to_the_process() -> None:
    for row in swept().rows[:3]:
        assert row.forecast is not None
        pieces = pieces_of(row.forecast)
        assert pieces is not None
        assert sum(pieces.sizes.values()) == pieces.total == sum(ledger_of(row.forecast).values())
        assert min(pieces.sizes.values()) >= 0


def test_the_table_and_the_chart_say_what_the_rows_say() -> None:
    text = sweep_text(swept(), 80)
    values = sweep_json(swept())
    assert "64: 64 is too much" in text
    assert f"short {gib(values[2]['short_by_bytes'])}" in text
    assert values[3]["bytes"] is None
    assert all(len(line) <= 84 for line in text.splitlines())
    bars = text.splitlines()[-5:-2]
    assert [bar.count("A") for bar in bars] == sorted(bar.count("A") for bar in bars)
    assert bars[2].index("|") == bars[0].index("|"), "the card ends at one place"


# ---- the picture -----------------------------------------------------------------------------------------------------

LIGHT = Levers(activation_offload=False)


@functools.cache
def planned(room: int = 130_000, count: int = 2) -> SearchResult:
    return answer(search(Recipe(model="m", batch=4, levers=LIGHT), hardware(count, room)), 3)


def words(canvas: Canvas) -> list[str]:
    return [item.text for item in canvas.items if isinstance(item, Text)]


def test_every_combination_is_a_point() -> None:
    one = search(Recipe(model="m", batch=4, levers=LIGHT), hardware(2, 130_000))
    result = answer(one, 3)
    assert len(result.points) == sum(map(len, one.axes.legal.values()))
    assert sum(point.state == "fits" and not point.why for point in result.points) == len(result.ranked)
    chosen = min((p for p in result.points if p.state == "fits" and not p.why), key=lambda p: (p.tier, p.seconds))
    assert result.chosen is not None
    assert chosen.levers["levers.parallel"] == result.chosen.recipe.levers.parallel
    for point in result.points:
        assert (point.short_by_bytes > 0) == (point.state == "refused")
        if point.state == "refused" and point.place == "gpu":
            assert (point.gpu_bytes or 0) - (result.capacity_bytes or 0) >= point.short_by_bytes


@pytest.mark.parametrize("room", [2_000, 130_000, 10**7])
def test_a_picture_shows_what_became_of_them(room: int) -> None:
    result = planned(room)
    canvas = draw_plan(result, "a plan with a name that is much longer than the picture is wide " * 3)
    told = words(canvas)
    assert ("chosen" in told) == (result.chosen is not None)
    for item in canvas.items:
        points = [item.at] if isinstance(item, Text) else item.points
        assert all(0 <= x <= canvas.width and 0 <= y <= canvas.height for x, y in points), item
    fits = [item for item in canvas.items if isinstance(item, Shape) and item.fill == STATES["fits"][0]]
    assert len(fits) >= len(result.ranked)


@pytest.mark.parametrize("suffix", [".svg", ".png", ".html"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = write_plan_picture(planned(), "a <plan>", tmp_path / f"picture{suffix}")
    if suffix == ".png":
        with Image.open(path) as image:
            assert image.width > 2000
        return
    text = path.read_text(encoding="utf-8")
    ElementTree.fromstring(text if suffix == ".svg" else text[text.index("<svg") : text.index("</svg>") + 6])
    assert "a &lt;plan&gt;" in text
    with pytest.raises(UserError, match=r"name it picture\.svg"):
        write_plan_picture(planned(), "a", tmp_path / "picture.pdf")


# ---- why not ---------------------------------------------------------------------------------------------------------


def test_why_not_tells_what_the_search_found() -> None:
    data = json.loads(json.dumps(file_json(planned())))
    levers = data["chosen"]["recipe"]["levers"]
    assert "is what was chosen" in why_not(data, {"levers.parallel": levers["parallel"]})[0]
    told: dict[str, str] = {}
    for name in ("none", "ddp", "zero1", "zero2", "zero3", "fsdp"):
        told[name] = "\n".join(why_not(data, {"levers.parallel": name}))
    assert "no combination has it" in told["none"]
    refused = [name for name, text in told.items() if "refused: " in text]
    assert refused
    for name in refused:
        shorts = [p.short_by_bytes for p in planned().points if p.state == "refused"]
        mine = [
            p.short_by_bytes for p in planned().points if p.state == "refused" and p.levers["levers.parallel"] == name
        ]
        assert f"{gib(min(mine))} more" in told[name]
        assert min(shorts) <= min(mine)
    with pytest.raises(UserError, match=r"method was not searched; it stayed full"):
        why_not(data, {"method": "lora"})
    with pytest.raises(UserError, match="does not say what became"):
        why_not({"chosen": None}, {"levers.parallel": "ddp"})


def test_lines_fit_a_narrow_terminal() -> None:
    for width in (60, 80, 120):
        assert max(len(line) for line in plan_text(planned(), width).splitlines()) <= width
    wide = plan_text(planned(), None)
    assert all(reason in wide for reason in planned().ranked[0].reasons)
