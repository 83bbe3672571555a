"""Pictures from files: their size from the header alone, and their pixels. The only place that opens a picture.

Size and pixels come from one way of opening, so that the width that is planned with is the width that is trained on:
EXIF orientation is applied by both, found by both in what stands before the pixel data.
"""

from __future__ import annotations

import functools
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from memfit.errors import UserError

# Pillow's own limit (PIL.Image.MAX_IMAGE_PIXELS, 1 GiB / 4 / 3): 256 MiB as RGB. A3 at 600 dpi has 70 million.
MAX_PIXELS = 89_478_485
# Formats that store one picture's pixels. Left out: what is drawn by outside programs (EPS, WMF) or is a container.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
# EXIF 2.32, tag 0x0112: how the stored picture must be turned to stand upright. 1 is upright already.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_LFS = b"version https://git-lfs"
# warnings.catch_warnings changes a table of the whole process: one thread at a time.
_opening = threading.Lock()


class ImageError(Exception):
    """This picture cannot be used; `reason` is a key of `specs.check.REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels of the upright picture, from the file's header. Raises ImageError."""
    with open_regular(path) as file, opened(path, file) as image:
        return upright_size(image)


def open_image(path: Path, most_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright picture as RGB. Raises ImageError, before any pixel is decoded for one of more than `most_pixels`.

    Transparency is dropped without blending, as `convert("RGB")` does in the models' own scripts; 16-bit grey is scaled
    to 8 bit (Pillow would clip it to white).
    """
    with open_regular(path) as file, opened(path, file) as image:
        if image.width * image.height > most_pixels:
            raise ImageError(
                "oversized-image",
                f"{path}: {image.width} x {image.height} = {image.width * image.height:,} pixels, the largest picture "
                f"had {most_pixels:,} when the data was checked; start the run again",
            )
        return decode(path, image)


def open_regular(path: Path) -> BufferedReader:
    """`path` opened for reading. ImageError unless it is an ordinary file (a pipe would wait for ever)."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError("missing-image", f"{path} is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("unreadable-image", f"{path} is not an ordinary file")
        if status.st_size == 0:
            raise ImageError("truncated-image", f"{path} is empty (0 bytes)")
        return path.open("rb")
    except FileNotFoundError as error:
        raise ImageError("missing-image", f"{path} does not exist{_backslash_hint(path)}") from error
    except ValueError as error:  # a NUL byte
        raise ImageError("missing-image", f"{str(path)!r} is not a path ({error})") from error
    except OSError as error:
        reason = "missing-image" if isinstance(error, NotADirectoryError) else "unreadable-image"
        raise ImageError(reason, f"{path}: {error.strerror}") from error


def _backslash_hint(path: Path) -> str:
    other = str(path).replace("\\", "/")
    return f", but {other} does: write / for \\" if other != str(path) and os.path.exists(other) else ""


@contextmanager
def opened(path: Path, file: BufferedReader) -> Iterator[Image.Image]:
    """The picture in `file` with its header read and no pixel decoded. ImageError when it is none or too large."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UserError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on: cut-off pictures would load as grey areas",
            "remove the line that sets it (in your script or a package that it imports)",
        )
    try:
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remark on large pictures: they are refused below
            image = Image.open(file, formats=readable_formats())
    except Image.DecompressionBombError as error:
        raise ImageError("oversized-image", f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        file.seek(0)
        lfs = file.read(len(_LFS)) == _LFS
        what = "is a Git LFS pointer, not the picture (git lfs pull)" if lfs else "is no picture that Pillow can read"
        raise ImageError("unreadable-image", f"{path} {what}") from error
    except Exception as error:  # third-party parsers raise what they like on damaged headers
        raise ImageError("truncated-image", f"{path}: {_one_line(error)}") from error
    with image:
        if image.width * image.height > MAX_PIXELS:
            size = f"{image.width} x {image.height} = {image.width * image.height:,} pixels"
            raise ImageError("oversized-image", f"{path}: {size}, the limit is {MAX_PIXELS:,}")
        yield image


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation (1 to 8) as the header states it; 1 when there is none or it cannot be read.

    The base class's `getexif` is called on purpose: PNG's own would decode all pixels to look for a block behind them.
    Pillow turns TIFF by itself and reports its size turned.
    """
    if image.format == "TIFF":
        return 1
    try:
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block says nothing; the picture itself is sound
        return 1
    return value if value in _TURNS else 1


def sideways(exif: Image.Exif) -> bool:
    """Whether an EXIF block turns its picture by a quarter, so that width and height change places."""
    return exif.get(ExifTags.Base.Orientation, 1) in _SIDEWAYS


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after the orientation has been applied."""
    width, height = image.size
    return (height, width) if orientation(image) in _SIDEWAYS else (width, height)


def decode(path: Path, image: Image.Image) -> Image.Image:
    """All pixels of an opened picture: upright, RGB, first frame. ImageError when the file is cut off or damaged."""
    turn = _TURNS.get(orientation(image))
    try:
        image.load()
        rgb = _to_rgb(path, image)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # third-party decoders raise what they like on damaged data
        raise ImageError("truncated-image", f"{path}: {_one_line(error)}") from error
    return rgb if turn is None else rgb.transpose(turn)


def _to_rgb(path: Path, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            "unreadable-image", f"{path}: 32-bit pixels (mode {image.mode}) have no fixed white; save as 8 bit"
        )
    return image.convert("RGB")


def _one_line(error: Exception) -> str:
    """What the decoder said; the kind of error too where it is not one that is meant for readers."""
    text = str(error) if isinstance(error, OSError | SyntaxError) and str(error) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
