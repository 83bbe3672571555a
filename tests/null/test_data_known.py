"""Pictures that were looked at before: not decoded again while the file stays, looked at again when it changes."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
from pathlib import Path

import pytest
from PIL import Image

from memfit.inputs.cache import cache_folder
from memfit.inputs.data import known, scan
from memfit.inputs.data.known import ImageFacts, KnownImages
from memfit.inputs.data.scan import ImageProblem, scan_images


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A cache of this test's own, files that count as settled at once, and the files that are really read."""
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "SETTLED_NS", 0)
    read: list[Path] = []
    real = scan.look_at
    monkeypatch.setattr(scan, "look_at", lambda path, thumb: (read.append(path), real(path, thumb))[1])
    return read


def pictures(folder: Path, count: int = 3) -> list[Path]:
    paths = [folder / f"{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        Image.new("RGB", (10 + index, 20), (index, 0, 0)).save(path)
    return paths


def test_what_check_has_decoded_is_not_decoded_again(looked: list[Path], tmp_path: Path) -> None:
    paths = pictures(tmp_path)
    first = scan_images(paths, thumbs=True, workers=1)
    assert looked == paths
    again = scan_images(paths, thumbs=False, workers=1)
    assert looked == paths
    for path in paths:
        before = first[path]
        assert isinstance(before, ImageFacts)
        assert before.thumb is not None
        assert again[path] == dataclasses.replace(before, thumb=None)


def test_thumbnails_are_always_made_from_the_file(looked: list[Path], tmp_path: Path) -> None:
    paths = pictures(tmp_path)
    scan_images(paths, thumbs=False, workers=1)
    found = scan_images(paths, thumbs=True, workers=1)
    assert looked == paths * 2
    assert all(isinstance(fact, ImageFacts) and fact.thumb for fact in found.values())


def test_a_changed_file_is_read_again_even_with_its_old_size_and_date(looked: list[Path], tmp_path: Path) -> None:
    path = pictures(tmp_path, 1)[0]
    scan_images([path], thumbs=False)
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-20] ^= 0xFF  # inside the pixels: their checksum no longer fits
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert isinstance(scan_images([path], thumbs=False)[path], ImageProblem)
    assert looked == [path, path]


def test_problems_are_not_remembered(looked: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"no picture")
    for _ in range(2):
        assert isinstance(scan_images([path], thumbs=False)[path], ImageProblem)
    assert looked == [path, path]


def test_a_file_that_was_just_written_is_not_trusted(
    looked: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "SETTLED_NS", 60 * 10**9)
    paths = pictures(tmp_path, 1)
    for _ in range(2):
        scan_images(paths, thumbs=False)
    assert looked == paths * 2


@pytest.mark.parametrize("damage", ["no database", "a folder", "other columns"])
def test_a_cache_that_cannot_be_used_costs_time_only(looked: list[Path], tmp_path: Path, damage: str) -> None:
    file = cache_folder() / "images.sqlite"
    file.parent.mkdir()
    if damage == "a folder":
        file.mkdir()
    elif damage == "no database":
        file.write_bytes(b"x" * 5000)
    else:
        with sqlite3.connect(file) as database:
            database.execute("CREATE TABLE images (something TEXT)")
    paths = pictures(tmp_path)
    for _ in range(2):
        found = scan_images(paths, thumbs=False, workers=1)
        assert all(isinstance(fact, ImageFacts) for fact in found.values())
    # A file that is no database is thrown away and made anew, from the second scan on.
    assert len(looked) == 6
    assert not KnownImages(file).find({path: known.stamp(path) for path in paths}) or damage == "no database"


def test_another_pillow_reads_again(looked: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = pictures(tmp_path, 1)
    scan_images(paths, thumbs=False)
    monkeypatch.setattr(Image, "__version__", "0.0")
    scan_images(paths, thumbs=False)
    assert looked == paths * 2
