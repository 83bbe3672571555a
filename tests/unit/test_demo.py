"""The demo's promises: real handwriting, disjoint blocks, a small model of the real architecture, no secret help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open


def draw(project: Path, folder: Path, *options: str) -> Path:
    command = [sys.executable, str(project / "demo/slips.py"), "--out", str(folder), *options]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "data.json"


@pytest.mark.long
def test_slips_are_ordinary_files_and_one_seed_draws_the_same(project: Path, tmp_path: Path) -> None:
    options = ("--hand", "handwritten", "--split", "train", "--count", "12", "--seed", "5")
    first, again = draw(project, tmp_path / "a", *options), draw(project, tmp_path / "b", *options)
    assert first.read_bytes() == again.read_bytes()
    rows = json.loads(first.read_text())
    assert len(rows) == 12
    for row in rows:
        picture = tmp_path / "a" / row["image"]
        assert picture.read_bytes() == (tmp_path / "b" / row["image"]).read_bytes()
        with Image.open(picture) as image:
            assert max(image.size) <= 224
        assert isinstance(json.loads(row["conversations"][-1]["content"]), dict)
    other = draw(project, tmp_path / "c", *options[:-1], "6")
    assert other.read_bytes() != first.read_bytes()


def test_train_and_heldout_handwriting_are_disjoint_blocks(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(project / "demo"))
    import slips

    train, heldout = slips.handwriting_of("train"), slips.handwriting_of("heldout")
    sizes = {digit: (len(train[digit]), len(heldout[digit])) for digit in range(10)}
    assert sum(count for count, _ in sizes.values()) == slips.TRAIN_GLYPHS
    assert sum(count for _, count in sizes.values()) == 1797 - slips.TRAIN_GLYPHS
    seen = {glyph.tobytes() for digit in range(10) for glyph in train[digit]}
    assert not [1 for digit in range(10) for glyph in heldout[digit] if glyph.tobytes() in seen]


def test_the_embedded_model_is_small_and_of_the_real_architecture(project: Path) -> None:
    folder = project / "demo/model"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "minicpmv4_6"
    assert config["downsample_mode"] == "4x"
    assert set(config["text_config"]["layer_types"]) == {"full_attention"}
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    with safe_open(weights, "pt") as file:
        count = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - no mapping
    assert count <= 4_000_000


def test_the_package_knows_nothing_of_the_demo(project: Path) -> None:
    words = ("order slip", "handwrit", "demo/")
    found = [
        f"{path.name}: {word}"
        for path in (project / "memfit").rglob("*.py")
        for word in words
        if word in path.read_text(encoding="utf-8").lower()
    ]
    assert not found


def test_the_log_of_the_base_model_is_there(project: Path) -> None:
    lines = [json.loads(line) for line in (project / "demo/base_log.jsonl").read_text().splitlines()]
    assert lines[-1]["exact"] >= 0.9
    assert all({"seed", "stage", "seconds", "exact", "field_f1"} <= line.keys() for line in lines)
