"""The data loader's host memory: one picture at a time, a bound before decoding, a forecast that holds."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import memfit
from memfit.build.data import Collator, SampleDataset
from memfit.build.pixels import PixelReader
from memfit.catalog.process import WORKER
from memfit.errors import UserError
from memfit.families import family_for
from memfit.families.tensors import patch_bytes
from memfit.inputs.data import load_samples
from memfit.inputs.data.images import ImageError, open_image
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import find_model
from memfit.physics.loader import loader_load, making_bytes, reading_bytes
from memfit.planner.forecast_json import forecast_json
from memfit.specs.recipe import Data, Recipe
from memfit.specs.trace import TraceBatch
from memfit.specs.workload import ImageCost, LoaderLoad
from memfit.testing import NATIVE_KINDS
from memfit.trace.batch import make_batch
from tests.unit.conftest import VISION_KINDS

Make = Callable[..., Recipe]
Folder = Callable[[str], Path]


def pictures(folder: Path, sizes: list[tuple[int, int]], mode: str = "RGB", a_row: int = 1) -> Path:
    """A data file of PNGs that are turned by their EXIF block, `a_row` of them in each row."""
    rows, names = [], []
    for number, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6
        picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR).convert(mode)
        picture.save(folder / f"{number}.png", exif=exif, compress_level=1)
        names.append(f"{number}.png")
    for start in range(0, len(names), a_row):
        own = names[start : start + a_row]
        turns = [
            {"role": "user", "content": "<image>\n" * len(own) + "Read."},
            {"role": "assistant", "content": "words " * (5 + start)},
        ]
        rows.append({"images": own, "messages": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


# ---------------------------------------------------------------- one picture at a time


@pytest.mark.parametrize("kind", [*VISION_KINDS, "minicpmv2_5"])
def test_pictures_one_by_one_are_what_all_at_once_are(dummies: Folder, tmp_path: Path, kind: str) -> None:
    source = find_model(str(dummies(kind)))
    encoder = Encoder(source)
    data = pictures(tmp_path, [(300, 200), (90, 120), (640, 150)], a_row=3)
    (sample,) = load_samples(Data(train=str(data), eval=None), None, encoder).train
    turned = dataclasses.replace(sample.turns[0], pieces=(2, 0, 1, "Read."))
    sample = dataclasses.replace(sample, turns=(turned, *sample.turns[1:]))
    reader = PixelReader(encoder.family, encoder.processor_settings)
    alive: list[Image.Image] = []
    most = 0

    def read(path: Path) -> Image.Image:
        nonlocal most
        picture = Counted(open_image(path), alive)
        most = max(most, len(alive))
        return picture

    row = SampleDataset([sample], encoder, reader, read=read)[0]
    assert most == 1
    together = reader.read([open_image(sample.images[index]) for index in (2, 0, 1)])
    assert set(together) <= set(row)
    assert all(torch.equal(row[name], value) for name, value in together.items())


class Counted(Image.Image):
    """A picture that stands in a list for as long as anybody holds it."""

    def __init__(self, picture: Image.Image, alive: list[object]) -> None:
        super().__init__()
        self._im, self._mode, self._size = picture.im, picture.mode, picture.size
        self._alive = alive
        alive.append(1)

    def __del__(self) -> None:
        self._alive.pop()


def test_a_picture_that_has_grown_is_refused_before_decoding(
    dummies: Folder, recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(path)
    assert open_image(path, most_pixels=1200).size == (40, 30)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="1,200 pixels, the largest picture had 1,199 when the data was checked"):
        open_image(path, most_pixels=1199)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changes_while_it_trains_is_a_users_error(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    data = pictures(tmp_path, [(60, 40)] * 4)
    monkeypatch.setattr("memfit.engine.launch.train", changed_first(tmp_path / "2.png"))
    with pytest.raises(UserError, match=r"row 2: .*2\.png: 80 x 80 = 6,400 pixels.*had 2,400") as caught:
        memfit.train(
            recipe("minicpmv2_6", f"data.train={data}", f"loader.workers={workers}", "schedule.steps=4"),
            say=lambda text: None,
        )
    assert "memfit check" in caught.value.hint


def changed_first(path: Path) -> Callable[..., object]:
    from memfit.engine.train import train

    def run(job: object) -> object:
        Image.new("RGB", (80, 80)).save(path)
        return train(job)  # type: ignore[arg-type]

    return run


# ---------------------------------------------------------------- the forecast


def test_by_hand() -> None:
    figures = {
        "tokens": np.array([100, 50, 10]),
        "patches": np.array([0, 1000, 900]),
        "crops": np.array([0, 1, 2]),
    }
    load = loader_load(figures, 588, 2, reading_bytes(100, 200, ".PNG"))
    assert load.reading == 100 * 200 * 14
    assert load.sample == 100 * 32 + 588_000 + 24
    assert load.batch == 2 * 3200 + (588_000 + 24) + (529_200 + 48)
    assert making_bytes(load) == load.reading + 4 * load.sample + 2 * load.batch
    assert reading_bytes(10, 10, ".webp") == 2100
    assert loader_load({name: values[:0] for name, values in figures.items()}, 588, 2, 9) == LoaderLoad(0, 0, 0)


@pytest.mark.parametrize("kind", [*VISION_KINDS, *(kind for kind in NATIVE_KINDS if kind not in VISION_KINDS), "llama"])
def test_bytes_of_a_patch_are_those_of_the_batch(dummies: Folder, kind: str) -> None:
    config = json.loads((dummies(kind) / "config.json").read_text())
    family = family_for(config)
    if family.images is None:
        assert patch_bytes(family, config) == 0
        return
    side = 8 if kind != "llava" else int(config["vision_config"]["image_size"]) // 14
    cost = ImageCost(((side, side),), (4,))
    batch = make_batch(family, config, TraceBatch((60,), ((cost,),)))
    pixels = batch["pixel_values"]
    assert pixels.numel() * pixels.element_size() == cost.patches * patch_bytes(family, config)


def test_a_load_is_no_less_than_any_batch(dummies: Folder, tmp_path: Path) -> None:
    data = pictures(tmp_path, [(300, 200), (90, 120), (640, 150), (1000, 800)])
    for kind in VISION_KINDS:
        encoder = Encoder(find_model(str(dummies(kind))))
        loaded = load_samples(Data(train=str(data), eval=None), None, encoder)
        figures = {
            name: np.array([getattr(cost, name) for cost in loaded.train_costs])
            for name in ("tokens", "patches", "crops")
        }
        load = loader_load(figures, patch_bytes(encoder.family, encoder.source.config), 3, loaded.reading)
        rows = list(SampleDataset(loaded.train, encoder, PixelReader(encoder.family, encoder.processor_settings)))
        collate = Collator(encoder.family, encoder.pad_id, {}, encoder.image_token_id)
        batch = collate(rows[1:])
        size = sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
        assert 0.5 * load.batch < size <= load.batch
        assert loaded.reading == 1000 * 800 * 14
        assert loaded.most_pixels == 800_000


def test_estimate_and_train_forecast_the_same_loader(recipe: Make, tmp_path: Path) -> None:
    data = pictures(tmp_path, [(600, 400), (900, 700), (100, 80)])
    wanted = recipe("minicpmv2_6", f"data.train={data}", "loader.workers=2", "schedule.steps=1", "batch=4")
    terms = {term.id: term for term in memfit.estimate(wanted).ledger.terms}
    result = memfit.train(wanted, say=lambda text: None)
    plan = json.loads((result.folder / "plan.json").read_text())
    then = {term["id"]: term["bytes"] for term in plan["forecast"]["host"]["terms"]}
    for name in ("host.workers", "host.prefetched", "host.decoded", "host.waiting_batches"):
        assert then[name] == terms[name].bytes > 0, name
    assert terms["host.workers"].bytes == 2 * WORKER[0]  # nothing is held out: one loader
    assert "900" not in terms["host.decoded"].formula
    assert f"{900 * 700 * 14:,} B" in terms["host.decoded"].formula
    # Two micro-batches a step and the next one: 3 of them wait; 2 workers x 2 ahead are ready.
    assert terms["host.waiting_batches"].bytes * 4 == terms["host.prefetched"].bytes * 3
    more = memfit.estimate(wanted, sets=["data.eval=0.4"])
    assert {t.id: t.bytes for t in more.ledger.terms}["host.workers"] == 4 * WORKER[0]


def test_a_loader_too_large_for_the_host_is_refused(recipe: Make, tmp_path: Path) -> None:
    """Pinned workers and prefetch are the user's: memfit says that they do not fit instead of changing them."""
    data = pictures(tmp_path, [(600, 400)])
    sets = ["loader.workers=4", "hardware.host_memory=2GiB"]
    wanted = recipe("minicpmv2_6", f"data.train={data}", *sets)
    assert forecast_json(memfit.estimate(wanted))["verdict"] != "does-not-fit"
    assert memfit.estimate(wanted, sets=["loader.workers=40"]).fits is False


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.long
def test_workers_take_no_more_than_was_forecast(dummies: Folder, tmp_path: Path) -> None:
    """Measured: private memory of the workers and shared memory, RGBA PNGs of 2 megapixels that EXIF turns."""
    kind, workers, prefetch, micro = "minicpmv2_6", 2, 2, 1
    data = pictures(tmp_path, [(1600, 1200)] * 4, "RGBA")
    words = [str(dummies(kind)), str(data), str(workers), str(prefetch), str(micro), "9"]
    run = subprocess.run(
        [sys.executable, "-m", "tests.unit.loader_probe", *words],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    found = json.loads(run.stdout)
    config = json.loads((dummies(kind) / "config.json").read_text())
    tokens, patches, crops = np.array(found["costs"]).T
    figures = {"tokens": tokens, "patches": patches, "crops": crops}
    load = loader_load(figures, patch_bytes(family_for(config), config), micro, found["reading"])
    assert found["batch"] <= load.batch
    assert found["one"] <= WORKER[0] + making_bytes(load)
    assert found["private"] <= workers * (WORKER[0] + making_bytes(load))
    # Ready, being taken, and the one that a worker has just put there.
    assert found["shared"] <= (workers * prefetch + 2) * load.batch
    assert found["one"] > 1600 * 1200 * 8  # a picture and its copy: three bytes a pixel would be far too few
