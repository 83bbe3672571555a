"""Upright sizes of picture files from what stands in front of their pixels: nothing is decoded.

For forecasts. A file that is cut off behind its header is found by `scan`, which training and `memfit check` use.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from PIL import Image

from memfit.inputs.data.images import MAX_PIXELS, ImageError, open_regular, opened, sideways, upright_size
from memfit.inputs.data.known import KnownImages, stamp
from memfit.inputs.data.scan import ImageProblem, default_workers

_EXIF_MARK = b"Exif\0\0"
_TOGETHER = 16  # files that one thread looks at in turn: handing over each by itself takes as long as looking


@dataclass(frozen=True)
class ImageHeader:
    """A picture's upright size in pixels and its file's bytes."""

    width: int
    height: int
    bytes: int


Headers = dict[Path, ImageHeader | ImageProblem]


class HeaderReader:
    """Reads headers, several at a time, and asks the cache of known pictures first.

    Every distinct path is looked at once in the reader's life; a picture that many rows show costs one look.
    """

    def __init__(self, workers: int | None = None, known: KnownImages | None = None) -> None:
        self._known = KnownImages() if known is None else known
        self._pool = ThreadPoolExecutor(max_workers=workers or default_workers())
        self._started: dict[Path, tuple[str | None, Future[Headers]]] = {}
        self.seen: Headers = {}

    def start(self, paths: Iterable[Path]) -> None:
        """Begin to read what has not been looked at; `read` of the same paths waits for it."""
        new = [path for path in dict.fromkeys(paths) if path not in self.seen and path not in self._started]
        if not new:
            return
        stamps = {path: stamp(path) for path in new}
        known = self._known.find_sizes(stamps)
        self.seen.update({path: ImageHeader(*size) for path, size in known.items()})
        unknown = [path for path in new if path not in known]
        for first in range(0, len(unknown), _TOGETHER):
            some = unknown[first : first + _TOGETHER]
            looking = self._pool.submit(look_at_headers, some)
            self._started.update({path: (stamps[path], looking) for path in some})

    def read(self, paths: Iterable[Path]) -> Headers:
        """The header, or the problem, of every path given."""
        wanted = list(dict.fromkeys(paths))
        self.start(wanted)
        stamps: dict[Path, str | None] = {}
        sizes: dict[Path, tuple[int, int, int]] = {}
        for path in wanted:
            if path in self._started:
                stamps[path], looking = self._started.pop(path)
                self.seen[path] = found = looking.result()[path]
                if isinstance(found, ImageHeader):
                    sizes[path] = (found.width, found.height, found.bytes)
        self._known.keep_sizes(stamps, sizes)
        return {path: self.seen[path] for path in wanted}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._known.close()


@contextmanager
def header_reader(workers: int | None = None) -> Iterator[HeaderReader]:
    """A HeaderReader that is closed at the end."""
    reader = HeaderReader(workers)
    try:
        yield reader
    finally:
        reader.close()


def look_at_headers(paths: Iterable[Path]) -> Headers:
    """The header or the problem of several files."""
    return {path: look_at_header(path) for path in paths}


def look_at_header(path: Path) -> ImageHeader | ImageProblem:
    """One file's header, or its problem."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            found = _webp_size(file)
            if found is not None and found[0] * found[1] <= MAX_PIXELS:
                return ImageHeader(*found, size)
            file.seek(0)
            with opened(path, file) as image:
                return ImageHeader(*upright_size(image), size)
    except ImageError as error:
        return ImageProblem(error.reason, error.detail)
    except OSError as error:  # the disk failed while the file was read
        return ImageProblem("unreadable-image", f"{path}: {error.strerror or error}")


def _webp_size(file: BufferedReader) -> tuple[int, int] | None:
    """The upright size of a WebP; None when it is none, or says something unexpected: then Pillow looks.

    Pillow reads the whole file to open a WebP. Source: RFC 9649, "WebP Image Format", sections 2.5 to 2.7.
    """
    head = file.read(30)
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    kind = head[12:16]
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return _positive(width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = struct.unpack_from("<I", head, 21)[0]
        return _positive((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind != b"VP8X":
        return None
    width = int.from_bytes(head[24:27], "little") + 1
    height = int.from_bytes(head[27:30], "little") + 1
    if head[20] & 0x04:  # XMP, which may turn the picture, too
        return None
    if not head[20] & 0x08:  # no EXIF chunk
        return width, height
    turned = _webp_is_sideways(file)
    return None if turned is None else (height, width) if turned else (width, height)


def _positive(width: int, height: int) -> tuple[int, int] | None:
    return (width, height) if width and height else None


def _webp_is_sideways(file: BufferedReader) -> bool | None:
    """Whether the EXIF chunk turns the picture by a quarter; None where it is not found. Chunks before are skipped."""
    place = 12
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            return None
        size = struct.unpack_from("<I", head, 4)[0]
        if head[:4] == b"EXIF":
            data = file.read(size)
            exif = Image.Exif()
            try:
                exif.load(data if data.startswith(_EXIF_MARK) else _EXIF_MARK + data)
                return sideways(exif)
            except Exception:  # a damaged EXIF block says nothing, as in `images.orientation`
                return False
        place += 8 + size + (size & 1)
