"""The workload scan with real encoders: the figures of a full check, and what an image budget takes away."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

import memfit
from memfit.inputs.data import load_samples
from memfit.inputs.data.options import check_options
from memfit.inputs.data.workload import cut_by_image, scan_workload
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import find_model
from memfit.specs.recipe import Data, ImageBudget, Recipe
from memfit.trace.forecast import worst_rows
from tests.unit.conftest import VISION_KINDS

SIZES = ((900, 700), (300, 200), (640, 1200), (80, 60), (1000, 1000))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five pictures, the third of them turned by its EXIF block, with answers of several lengths."""
    rows = []
    for number, (width, height) in enumerate(SIZES):
        values = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 2 else 1
        Image.fromarray(values).save(tmp_path / f"{number}.jpg", exif=exif)
        turns = [
            {"role": "user", "content": "<image>\nRead it."},
            {"role": "assistant", "content": "word " * (3 + 40 * (number % 2))},
        ]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path / "data.json"


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_headers_give_what_decoding_gives(dummies: Callable[[str], Path], data: Path, kind: str) -> None:
    source = find_model(str(dummies(kind)))
    recipe = Recipe(model=str(dummies(kind)), data=Data(train=str(data), eval=None))
    encoder = Encoder(source, recipe.image)
    loaded = load_samples(recipe.data, check_options(recipe), encoder)
    scan = scan_workload(recipe, encoder)
    assert [scan.cost(index) for index in range(len(SIZES))] == list(loaded.train_costs)
    for count in (1, 3, 5):
        assert scan.batch_rows(count) == worst_rows(loaded.train, loaded.train_costs, encoder, count)
    assert scan.sample(2).sizes == ((1200, 640),)


def test_what_one_slice_would_cut(dummies: Callable[[str], Path], data: Path) -> None:
    """Exact: the tokens of every sample under both budgets."""
    source = find_model(str(dummies("minicpmv4_6")))
    recipe = Recipe(model=str(dummies("minicpmv4_6")), data=Data(train=str(data), eval=None))
    whole, one = Encoder(source), Encoder(source, ImageBudget(max_slices=1))
    scan = scan_workload(recipe, whole)
    cut = cut_by_image(scan, recipe, whole, ImageBudget(max_slices=1))
    before = [whole.cost(*size).tokens for size in ((1200, 640) if size == (640, 1200) else size for size in SIZES)]
    after = [one.cost(*size).tokens for size in ((1200, 640) if size == (640, 1200) else size for size in SIZES)]
    assert cut.budget == "image.max_slices: 1"
    assert cut.samples == sum(a != b for a, b in zip(before, after, strict=True)) > 0
    assert cut.image_token_share == pytest.approx((sum(before) - sum(after)) / sum(before))
    assert cut.tokens > 0
    assert 0 < cut.token_share < 1


def test_an_estimate_decodes_no_picture(
    dummies: Callable[[str], Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    sets = (f"data.train={data}", "data.eval=null", "method=lora", "hardware={gpus: 1xcpu}")
    forecast = memfit.estimate(None, model=str(dummies("minicpmv4_6")), sets=sets)
    assert forecast.trace is not None
    assert forecast.trace.written
