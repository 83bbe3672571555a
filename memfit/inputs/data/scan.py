"""Look at every picture file once, several at a time, and keep numbers: never the pixels.

Threads, not processes: Pillow's decoders run outside Python's lock (two threads decode twice as fast), and threads need
no `if __name__ == "__main__"` in a user's script.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from memfit.inputs.data.images import ImageError, decode, open_regular, opened
from memfit.inputs.data.known import ImageFacts, KnownImages, stamp

# (what is done, how many are done, how many there are or None)
Progress = Callable[[str, int, int | None], None]

THUMB = 64  # side of the grey thumbnail that near-duplicates are found with
MOST_THUMBS = 100_000  # thumbnails kept of one scan: 4 KiB each, 0.4 GiB
_CHUNK = 128  # files handed to the threads at a time: bounds what is waiting, and paces the progress calls
_MOST_WORKERS = 8  # each may hold one decoded picture and its hash's copy: at most 512 MiB at images.MAX_PIXELS


@dataclass(frozen=True)
class ImageProblem:
    """Why a picture file cannot be used; `reason` is a key of `specs.check.REASONS`."""

    reason: str
    detail: str


Scan = dict[Path, ImageFacts | ImageProblem]


def default_workers() -> int:
    """Threads for decoding: the processors this process may use, at most 8."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return min(_MOST_WORKERS, len(affinity(0)) if affinity else os.cpu_count() or 1)


def scan_images(
    paths: Iterable[Path], thumbs: bool, workers: int | None = None, progress: Progress | None = None
) -> Scan:
    """Facts or the problem of every distinct path; every pixel is read, which alone finds cut-off files.

    Without thumbnails, a file that has not changed since it was last read is not read again. At most `workers` pictures
    are in memory at a time, and at most MOST_THUMBS thumbnails at the end.
    """
    unique = list(dict.fromkeys(paths))
    found: Scan = {}
    known = KnownImages()
    with contextlib.closing(known), ThreadPoolExecutor(max_workers=workers or default_workers()) as pool:
        for start in range(0, len(unique), _CHUNK):
            chunk = unique[start : start + _CHUNK]
            stamps = {path: stamp(path) for path in chunk}
            found.update({} if thumbs else known.find(stamps))
            new = [path for path in chunk if path not in found]
            look = functools.partial(look_at, thumb=thumbs and start + len(chunk) <= MOST_THUMBS)
            seen = list(zip(new, pool.map(look, new), strict=True))
            found.update(seen)
            known.keep(stamps, [(path, fact) for path, fact in seen if isinstance(fact, ImageFacts)])
            if progress:
                progress("pictures", len(found), len(unique))
    return found


def look_at(path: Path, thumb: bool) -> ImageFacts | ImageProblem:
    """One file's facts, or its problem."""
    try:
        with open_regular(path) as file:
            content = hashlib.file_digest(file, _new_hash).hexdigest()
            file.seek(0)
            with opened(path, file) as image:
                return _facts(image, decode(path, image), content, thumb)
    except ImageError as error:
        return ImageProblem(error.reason, error.detail)
    except OSError as error:  # the disk failed while the file was read
        return ImageProblem("unreadable-image", f"{path}: {error.strerror or error}")


def _new_hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def _facts(image: Image.Image, rgb: Image.Image, content: str, thumb: bool) -> ImageFacts:
    digest = _new_hash()
    digest.update(f"{rgb.width}x{rgb.height}:".encode())
    digest.update(rgb.tobytes())
    extrema = np.asarray(rgb.getextrema())
    return ImageFacts(
        width=rgb.width,
        height=rgb.height,
        content=content,
        pixels=digest.hexdigest(),
        thumb=thumbnail(rgb) if thumb else None,
        pages=_has_pages(image),
        blank=bool((extrema[:, 0] == extrema[:, 1]).all()),
        transparent=_has_transparency(image),
    )


def thumbnail(rgb: Image.Image) -> bytes:
    """THUMB x THUMB grey bytes. The triangle filter, because a box filter tells a picture from its smaller copy."""
    return rgb.convert("L").resize((THUMB, THUMB), Image.Resampling.BILINEAR).tobytes()


def _has_pages(image: Image.Image) -> bool:
    """Further frames or pages. MPO is left out: phones store a depth map there, not another picture."""
    return image.format != "MPO" and bool(getattr(image, "is_animated", False))


def _has_transparency(image: Image.Image) -> bool:
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return False
    lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
    return isinstance(lowest, int | float) and lowest < 255
