"""Pictures: sizes and pixels agree, EXIF is honoured, damaged and dangerous files are refused, paths stay inside."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from memfit.errors import UserError
from memfit.inputs.data import images
from memfit.inputs.data.draft import RowError
from memfit.inputs.data.images import ImageError, open_image, read_size
from memfit.inputs.data.paths import DataRoot
from memfit.inputs.data.scan import ImageFacts, ImageProblem, look_at, scan_images


def picture(width: int = 60, height: int = 40, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def problem(path: Path) -> ImageError:
    """The error of opening the pixels."""
    with pytest.raises(ImageError) as caught:
        open_image(path)
    return caught.value


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "gif", "tif", "ppm"])
def test_size_and_pixels_agree(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    picture().save(path)
    opened = open_image(path)
    assert read_size(path) == opened.size == (60, 40)
    assert opened.mode == "RGB"


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation(tmp_path: Path, kind: str, turn: int) -> None:
    path = tmp_path / f"a.{kind}"
    exif = Image.Exif()
    exif[0x0112] = turn
    picture().save(path, exif=exif)
    opened = open_image(path)
    assert read_size(path) == opened.size == ((40, 60) if turn >= 5 else (60, 40))
    with Image.open(path) as stored:
        upright = ImageOps.exif_transpose(stored).convert("RGB")
    assert opened.tobytes() == upright.tobytes()


def test_png_size_needs_no_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_header(300, 200))
    assert read_size(path) == (300, 200)
    assert problem(path).reason == "truncated-image"


def test_damaged_exif_is_no_reason_to_lose_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    picture().save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert read_size(path) == open_image(path).size == (60, 40)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    picture(mode=mode).save(path)
    assert open_image(path).mode == "RGB"


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)).save(path)
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "f.tif")
    assert problem(tmp_path / "f.tif").reason == "unreadable-image"


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "bmp", "tif"])
def test_cut_off_files(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    picture(300, 200).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind.upper()))
    path = tmp_path / f"a.{kind}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    assert problem(path).reason in ("truncated-image", "unreadable-image")
    found = look_at(path, thumb=True)
    assert isinstance(found, ImageProblem)


def test_pixels_changed_inside_a_png(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    assert problem(path).reason == "truncated-image"


def test_cut_off_files_are_never_loaded_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UserError, match="LOAD_TRUNCATED_IMAGES"):
        open_image(path)


@pytest.mark.parametrize("size", [(9460, 9460), (200_000, 200_000)])
def test_too_many_pixels_are_refused_before_decoding(
    tmp_path: Path, size: tuple[int, int], recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_header(*size))
    assert problem(path).reason == "oversized-image"
    with pytest.raises(ImageError, match="oversized-image"):
        read_size(path)
    assert not recwarn.list
    path.write_bytes(png_header(9459, 9459))
    assert read_size(path) == (9459, 9459)  # 89,472,681 pixels: just below the limit


def test_the_limit_is_pillows_own() -> None:
    assert images.MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    for name, content, reason, said in (
        ("none.png", None, "missing-image", "does not exist"),
        ("empty.png", b"", "truncated-image", "0 bytes"),
        ("text.png", b"hello", "unreadable-image", "no picture"),
        ("lfs.png", b"version https://git-lfs.github.com/spec/v1\noid", "unreadable-image", "git lfs pull"),
        ("draw.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable-image", "no picture"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        error = problem(tmp_path / name)
        assert (error.reason, said in error.detail) == (reason, True), error.detail
    (tmp_path / "folder.png").mkdir()
    assert problem(tmp_path / "folder.png").reason == "missing-image"
    assert problem(tmp_path / "text.png" / "a.png").reason == "missing-image"
    assert problem(tmp_path / ("x" * 300)).reason == "unreadable-image"
    assert problem(tmp_path / "a\0b").reason == "missing-image"
    os.mkfifo(tmp_path / "pipe.png")
    assert "not an ordinary file" in problem(tmp_path / "pipe.png").detail


def test_backslashes_are_named(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    picture().save(tmp_path / "sub" / "a.png")
    assert "write / for \\" in problem(tmp_path / "sub\\a.png").detail


def test_scan_keeps_facts_not_pixels(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(150)]
    for index, path in enumerate(paths):
        picture(20, 30, seed=index % 3).save(path)
    picture(20, 30).save(tmp_path / "copy.bmp")
    told: list[tuple[str, int, int | None]] = []
    found = scan_images([*paths, *paths, tmp_path / "copy.bmp"], True, 2, lambda *args: told.append(args))
    facts = [fact for fact in found.values() if isinstance(fact, ImageFacts)]
    assert len(facts) == 151
    assert told[-1] == ("pictures", 151, 151)
    assert len({fact.pixels for fact in facts}) == 3  # the copy in another format shares its hash
    assert all((fact.width, fact.height, len(fact.thumb or b"")) == (20, 30, 64 * 64) for fact in facts)


def test_facts_of_odd_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), "white").save(tmp_path / "blank.png")
    frames = [picture(9, 9, seed=seed) for seed in range(2)]
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "pages.gif", save_all=True, append_images=frames[1:])
    glass = picture(9, 9, "RGBA")
    glass.save(tmp_path / "opaque.png")
    glass.putpixel((0, 0), (1, 2, 3, 0))
    glass.save(tmp_path / "glass.png")
    flags = {}
    for name in ("blank.png", "pages.tif", "pages.gif", "opaque.png", "glass.png"):
        facts = look_at(tmp_path / name, thumb=False)
        assert isinstance(facts, ImageFacts)
        assert facts.thumb is None
        flags[name] = (facts.blank, facts.pages, facts.transparent)
    assert flags == {
        "blank.png": (True, False, False),
        "pages.tif": (False, True, False),
        "pages.gif": (False, True, False),
        "opaque.png": (False, False, False),
        "glass.png": (False, False, True),
    }


def test_headers_are_quick(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(1000, 1000).save(path, compress_level=1)
    start = time.perf_counter()
    for _ in range(300):
        read_size(path)
    # At least 1,000 a second are wanted; about 10,000 are usual. Decoding this file 300 times takes over 3 seconds.
    assert time.perf_counter() - start < 0.3 * 3


# ---------------------------------------------------------------- paths


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """root/sub/a.png, a secret beside the root, and links that lead in and out."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    picture().save(root / "sub" / "a.png")
    picture().save(tmp_path / "secret.png")
    (root / "in.png").symlink_to(root / "sub" / "a.png")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "away").symlink_to(tmp_path)
    (tmp_path / "rooted").mkdir()  # begins like the root, and is not in it
    return root


@pytest.mark.parametrize(
    "name", ["sub/a.png", "./sub/../sub/a.png", "in.png", "sub//a.png", "ROOT/sub/a.png", "file:sub/a.png"]
)
def test_paths_inside(tree: Path, name: str) -> None:
    assert DataRoot(tree).resolve(name.replace("ROOT", str(tree))) == tree / "sub" / "a.png"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "sub/../../secret.png",
        "..",
        "sub/../..",
        "/etc/passwd",
        "out.png",
        "away/secret.png",
        "../rooted/a",
    ],
)
def test_paths_outside(tree: Path, name: str) -> None:
    root = DataRoot(tree)
    with pytest.raises(RowError) as caught:
        root.resolve(name)
    assert caught.value.reason == "outside-root"
    assert str(tree) in caught.value.detail


def test_nul_byte(tree: Path) -> None:
    with pytest.raises(RowError) as caught:
        DataRoot(tree).resolve("sub/a.png\0.txt")
    assert caught.value.reason == "missing-image"


def test_a_root_that_is_a_link_and_one_that_is_none(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tree)
    assert DataRoot(tmp_path / "link").resolve("sub/a.png") == tree / "sub" / "a.png"
    for root in (tmp_path / "none", tree / "sub" / "a.png"):
        with pytest.raises(UserError, match="image_root"):
            DataRoot(root)


def test_a_wider_root_is_proposed(tree: Path) -> None:
    root = DataRoot(tree / "sub")
    for name in (tree / "in2.png", tree / "other" / "b.png"):
        with pytest.raises(RowError):
            root.resolve(str(name))
    assert root.wider_root() == str(tree)
