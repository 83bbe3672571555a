"""The workload scan: headers only, every sample's figures, worst batches, and what a budget would cut."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from memfit.errors import UserError
from memfit.inputs.data import headers
from memfit.inputs.data.headers import HeaderReader, ImageHeader, look_at_header
from memfit.inputs.data.images import ImageError, open_image
from memfit.inputs.data.known import KnownImages, stamp
from memfit.inputs.data.scan import ImageFacts, ImageProblem, scan_images
from memfit.inputs.data.workload import scan_workload
from memfit.specs.recipe import Data, Recipe
from memfit.specs.sample import Sample
from memfit.specs.workload import ImageCost, SampleCost, heaviest

SIDE = 10  # pixels of a patch of the pretended model


@dataclass
class Encoded:
    words: int
    image_costs: tuple[ImageCost, ...]
    image_order: tuple[int, ...]


class PatchEncoder:
    """A word is a token, a picture one token and one crop of ceil(side / 10) patches a side, a fifth of them tokens."""

    def __init__(self, most_patches: int = 10**6) -> None:
        self.most_patches = most_patches

    def encode(self, sample: Sample, sizes: Sequence[tuple[int, int]]) -> Encoded:
        costs = []
        for width, height in sizes:
            rows, columns = -(-height // SIDE), -(-width // SIDE)
            while rows * columns > self.most_patches:
                rows, columns = max(1, rows // 2), max(1, columns // 2)
            costs.append(ImageCost(((rows, columns),), (rows * columns // 5 + 1,)))
        words = sum(len(turn.text.split()) for turn in sample.turns)
        return Encoded(words, tuple(costs), tuple(range(len(sizes))))

    def sample_cost(self, encoded: Encoded) -> SampleCost:
        images = sum(cost.tokens for cost in encoded.image_costs)
        patches = sum(cost.patches for cost in encoded.image_costs)
        return SampleCost(encoded.words + images, encoded.words // 2, images, len(encoded.image_costs), patches)

    def special_tokens_in(self, text: str) -> Sequence[str]:
        return ["<x>"] if "<x>" in text else []


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def row(number: int, image: str | None, words: int) -> dict[str, Any]:
    content = ("<image>\n" if image else "") + "word " * words
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    return {"id": f"r{number}", "conversations": turns} | ({"image": image} if image else {})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Six samples: a long text, two large pictures, a small one, one twice the same, and a missing picture."""
    for name, size in (("a.png", (200, 100)), ("b.jpg", (100, 300)), ("c.webp", (40, 30))):
        picture(*size).save(tmp_path / name)
    rows = [
        row(0, None, 900),
        row(1, "a.png", 3),
        row(2, "b.jpg", 4),
        row(3, "c.webp", 5),
        row(4, "c.webp", 6),
        row(5, "gone.png", 7),
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return Recipe(model="m", data=Data(train=str(tmp_path / "data.json")))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("turn", [None, *range(1, 9)])
def test_headers_agree_with_pixels(tmp_path: Path, kind: str, turn: int | None) -> None:
    path = tmp_path / f"a.{kind}"
    extra: dict[str, Any] = {}
    if turn is not None:
        exif = Image.Exif()
        exif[0x0112] = turn
        exif[0x010F] = "maker"
        extra["exif"] = exif
    picture(60, 40).save(path, **extra)
    found = look_at_header(path)
    assert isinstance(found, ImageHeader)
    assert (found.width, found.height) == open_image(path).size
    assert found.bytes == path.stat().st_size


@pytest.mark.parametrize("kind", ["jpg", "webp", "png"])
def test_a_turn_that_only_xmp_tells(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    extra: dict[str, Any] = {"xmp": xmp}
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode())
        extra = {"pnginfo": info}
    picture(60, 40).save(path, **extra)
    found = look_at_header(path)
    assert isinstance(found, ImageHeader)
    assert (found.width, found.height) == open_image(path).size


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"quality": 80, "method": 0}, {"mode": "RGBA"}])
def test_every_kind_of_webp(tmp_path: Path, options: dict[str, Any]) -> None:
    """Simple lossy, simple lossless, and extended (with transparency): sizes without Pillow's reading the file."""
    path = tmp_path / "a.webp"
    options = dict(options)
    mode = str(options.pop("mode", "RGB"))
    image = picture(75, 33).convert(mode)
    if mode == "RGBA":
        image.putalpha(100)
    image.save(path, **options)
    with path.open("rb") as file:
        assert headers._webp_size(file) == open_image(path).size == (75, 33)


def test_an_animated_webp_has_its_canvas(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    picture(50, 20).save(path, save_all=True, append_images=[picture(50, 20).rotate(90, expand=False)])
    found = look_at_header(path)
    assert isinstance(found, ImageHeader)
    assert (found.width, found.height) == open_image(path).size == (50, 20)


def test_a_webp_that_says_something_odd_is_left_to_pillow(tmp_path: Path) -> None:
    stream = io.BytesIO()
    picture(50, 20).save(stream, "WEBP")
    path = tmp_path / "a.webp"
    path.write_bytes(stream.getvalue()[:23] + b"???" + stream.getvalue()[26:])
    found = look_at_header(path)
    assert isinstance(found, ImageProblem)
    path.write_bytes(stream.getvalue()[:20])
    assert isinstance(look_at_header(path), ImageProblem)


def test_problems_are_told_as_decoding_tells_them(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name, reason in (
        ("text.png", "unreadable-image"),
        ("empty.jpg", "truncated-image"),
        ("gone.webp", "missing-image"),
    ):
        found = look_at_header(tmp_path / name)
        assert isinstance(found, ImageProblem)
        assert found.reason == reason


def test_no_pixel_is_decoded(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert scan_workload(recipe, PatchEncoder()).images == 4
    with pytest.raises(ImageError, match="decoded"):  # the trap works
        open_image(tmp_path / "a.png")


def test_figures_of_every_sample(recipe: Recipe, tmp_path: Path) -> None:
    """By hand: a.png 20 x 10 = 200 patches, 41 tokens; b.jpg 10 x 30 = 300, 61; c.webp 4 x 3 = 12, 3; one for "yes"."""
    scan = scan_workload(recipe, PatchEncoder())
    assert scan.figures["tokens"].tolist() == [901, 3 + 41 + 1, 4 + 61 + 1, 5 + 3 + 1, 6 + 3 + 1]
    assert scan.figures["image_tokens"].tolist() == [0, 41, 61, 3, 3]
    assert scan.figures["patches"].tolist() == [0, 200, 300, 12, 12]
    assert scan.figures["crops"].tolist() == [0, 1, 1, 1, 1]
    assert scan.figures["pixels"].tolist() == [0, 20_000, 30_000, 1200, 1200]
    assert scan.figures["bytes"].tolist()[1] == (tmp_path / "a.png").stat().st_size
    assert (scan.samples, scan.images, len(scan.broken)) == (5, 4, 1)
    assert (scan.broken[0].id, scan.broken[0].reason) == ("r5", "missing-image")
    assert {one.name for one in scan.distributions} == set(scan.figures)
    tokens = next(one for one in scan.distributions if one.name == "tokens")
    assert (tokens.count, tokens.maximum, sum(tokens.counts)) == (5, 901, 5)
    json.dumps(scan.to_json())


def test_the_worst_batch_by_tokens_and_by_patches(recipe: Recipe) -> None:
    scan = scan_workload(recipe, PatchEncoder())
    assert [sample.id for sample in scan.worst_batch(2)] == ["r0", "r2"]
    assert [sample.id for sample in scan.worst_batch(2, "patches")] == ["r2", "r1"]
    assert set(scan.worst_batches(1)) == {"tokens", "patches"}
    assert set(scan.worst_batches(5)) == {"tokens"}  # all of them: one batch
    assert [sample.id for sample in scan.worst_batch(2, max_length=100)] == ["r2", "r1"]
    assert scan.worst_batch(1, "patches")[0].sizes == ((100, 300),)
    row = scan.batch_rows(2)[1]
    assert row[:2] == (66, (ImageCost(((30, 10),), (61,)),))
    assert row.trained == scan.worst_batch(2)[1].cost.trained_tokens
    assert len(scan.worst_batch(99)) == 5
    assert scan.workload().worst.tokens == 901
    assert scan.workload(100).worst.tokens == 66
    mean = scan.workload().mean
    assert mean is not None
    assert mean.patches == round((200 + 300 + 12 + 12) / 5)


def test_what_a_length_would_cut(recipe: Recipe) -> None:
    scan = scan_workload(recipe, PatchEncoder())
    cut = scan.cut_by_length(60)
    total = 901 + 45 + 66 + 9 + 10
    assert (cut.samples, cut.sample_share) == (2, 2 / 5)
    assert (cut.tokens, cut.token_share) == (901 + 66, (901 + 66) / total)
    assert cut.image_token_share == 61 / (41 + 61 + 3 + 3)
    assert scan.cut_by_length(901).samples == 0


def test_what_an_image_budget_would_cut(recipe: Recipe) -> None:
    """At most 100 patches: 10 x 20 becomes 5 x 10 (11 tokens, was 41), 30 x 10 becomes 15 x 5 (16, was 61)."""
    scan, smaller = scan_workload(recipe, PatchEncoder()), scan_workload(recipe, PatchEncoder(100))
    cut = scan.cut_to(smaller, "image.max_pixels: 100 patches")
    assert (cut.samples, cut.sample_share, cut.tokens) == (2, 2 / 5, 30 + 45)
    assert cut.image_token_share == 75 / 108


def test_max_length_leaves_samples_out_and_keeps_them_countable(recipe: Recipe) -> None:
    scan = scan_workload(replace(recipe, max_length=60), PatchEncoder())
    assert scan.samples == 3
    assert scan.worst_batch(1)[0].id == "r1"
    assert scan.cut_by_length(60).samples == 2
    assert next(one for one in scan.distributions if one.name == "tokens").maximum == 45
    with pytest.raises(UserError, match="below every sample"):
        scan_workload(replace(recipe, max_length=3), PatchEncoder())


def test_limit_draws_the_rows_of_training(recipe: Recipe) -> None:
    from memfit.inputs.data import load_samples
    from memfit.inputs.data.options import check_options

    for limit in (1, 3, 4):
        small = replace(recipe, data=replace(recipe.data, limit=limit, eval=None, max_broken=0.9))
        try:
            loaded = load_samples(small.data, check_options(small), PatchEncoder())
        except UserError:
            with pytest.raises(UserError):
                scan_workload(small, PatchEncoder())
            continue
        assert scan_workload(small, PatchEncoder()).rows.tolist() == [sample.row for sample in loaded.train]


def test_nothing_usable_is_an_error(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([row(0, "gone.png", 3), row(1, None, 1) | {"conversations": []}]))
    with pytest.raises(UserError, match="none of 2 rows"):
        scan_workload(recipe, PatchEncoder())


def test_progress_comes_between_pieces(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([row(number, None, 3) for number in range(600)]))
    calls: list[tuple[str, int, int | None]] = []
    scan_workload(recipe, PatchEncoder(), lambda *call: calls.append(call))
    assert calls == [("samples", 256, None), ("samples", 512, None), ("samples", 600, None)]


def test_sizes_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    picture(60, 40).save(path)
    monkeypatch.setattr("memfit.inputs.data.known.SETTLED_NS", 0)
    time.sleep(0.01)
    first = HeaderReader()
    found = first.read([path])
    first.close()
    monkeypatch.setattr(headers, "look_at_header", lambda path: pytest.fail("read again"))
    again = HeaderReader()
    assert again.read([path, path]) == found == {path: ImageHeader(60, 40, path.stat().st_size)}
    again.close()
    monkeypatch.undo()
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path / "cache"))
    picture(30, 20).save(path)
    changed = HeaderReader()
    assert changed.read([path])[path] == ImageHeader(30, 20, path.stat().st_size)
    changed.close()


def test_reading_ahead_changes_nothing(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths[:4]):
        picture(10 + number, 20).save(path)
    reader = HeaderReader()
    reader.start(paths[:3])
    reader.start(paths)
    ahead = reader.read(paths)
    reader.close()
    plain = HeaderReader()
    assert ahead == plain.read(paths) == plain.read(paths)
    plain.close()
    assert [found.width for found in ahead.values() if isinstance(found, ImageHeader)] == [10, 11, 12, 13]
    assert isinstance(ahead[paths[4]], ImageProblem)


def test_what_decoding_found_is_known_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    picture(60, 40).save(path)
    monkeypatch.setattr("memfit.inputs.data.known.SETTLED_NS", 0)
    time.sleep(0.01)
    assert isinstance(scan_images([path], thumbs=False)[path], ImageFacts)
    known = KnownImages()
    assert known.find_sizes({path: stamp(path)}) == {path: (60, 40, path.stat().st_size)}
    known.close()


@dataclass
class Source:
    folder: Path


class CountingEncoder(PatchEncoder):
    """Says how often it was asked, and names a model folder, without which nothing is kept."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.source, self.calls = Source(folder), 0

    def encode(self, sample: Sample, sizes: Sequence[tuple[int, int]]) -> Encoded:
        self.calls += 1
        return super().encode(sample, sizes)


def test_a_scan_of_unchanged_data_is_kept(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And made again when anything that it rests on has changed: a picture, the data, the tokenizer, the recipe."""
    monkeypatch.setattr("memfit.inputs.data.known.SETTLED_NS", 0)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    time.sleep(0.01)
    encoder = CountingEncoder(folder)

    def calls(wanted: Recipe = recipe) -> int:
        before = encoder.calls
        scans.append(scan_workload(wanted, encoder))
        return encoder.calls - before

    scans: list[Any] = []
    assert (calls(), calls()) == (5, 0)
    assert scans[0] == scans[1]
    assert scans[0].to_json() == scans[1].to_json()
    assert scans[0].worst_batch(3) == scans[1].worst_batch(3)
    assert all((scans[0].figures[name] == scans[1].figures[name]).all() for name in scans[0].figures)
    limited = replace(recipe, max_length=100)
    assert calls(limited) > 0  # under a limit samples are used without some of their turns
    assert calls(limited) == 0
    picture(210, 100).save(tmp_path / "a.png")
    time.sleep(0.01)
    assert (calls(), calls()) == (5, 0)
    picture(20, 20).save(tmp_path / "gone.png")
    time.sleep(0.01)
    assert (calls(), calls()) == (6, 0)
    (folder / "tokenizer.json").write_text('{"other": 1}')
    time.sleep(0.01)
    assert (calls(), calls()) == (6, 0)
    assert (calls(replace(recipe, seed=7)), calls(replace(recipe, seed=7))) == (6, 0)
    for kept in (tmp_path / "cache/workloads").iterdir():
        kept.write_text("{")
    assert calls() == 6


def test_a_thousand_headers_a_second(tmp_path: Path) -> None:
    """An alarm with a wide margin: measured 5,300 a second on one busy core (benchmarks/scan_speed.py)."""
    for number in range(150):
        kind = ("png", "jpg", "webp")[number % 3]
        picture(320, 240).save(tmp_path / f"{number}.{kind}")
    reader = HeaderReader()
    start = time.process_time()
    found = reader.read(sorted(tmp_path.glob("*.*")))
    seconds = time.process_time() - start
    reader.close()
    assert len(found) == 150
    assert seconds < 0.15


def test_the_heaviest_batch_has_padding_where_it_can() -> None:
    """Equal rows need no mask; one shorter row costs as much after padding, and the mask beside."""
    assert heaviest([9, 9, 9, 7, 5], 2) == [0, 3]
    assert heaviest([9, 9, 9, 7, 5], 2, packing=True) == [0, 1]
    assert heaviest([9, 8, 8], 2) == [0, 1]
    assert heaviest([9, 9, 9], 2) == [0, 1]
    assert heaviest([9, 9, 7], 1) == [0]
    assert heaviest([9, 7], 5) == [0, 1]
