"""What was found in picture files before, so that `train` need not decode again what `check` has decoded.

A file counts as the same while its size and its times of change of content and inode stay (to the nanosecond). Only
facts are kept, no problems: a broken picture is looked at every time. It is a cache: whatever fails here costs time.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from memfit.inputs.cache import cache_folder

# Raised when facts change their meaning. Pillow's version stands beside it: decoders may differ by a rounding.
FORMAT = 1
# A file changed this shortly before it was read may change again within the same tick of the file system's clock.
SETTLED_NS = 1_000_000_000
_MOST_ASKED = 10_000  # paths in one question: SQLite takes 32,766 values


@dataclass(frozen=True)
class ImageFacts:
    """What is known of one picture file: its upright size, and more.

    `content`: hash of the file's bytes, the same on every machine. `pixels`: hash of size and RGB values, the same for
    a copy in another lossless format, but decoders of JPEG may differ by a rounding. `thumb`: THUMB x THUMB grey bytes,
    None where they were not asked for. `pages`: the file holds further frames, which are not used. `blank`: all pixels
    have one colour. `transparent`: some pixels are not opaque.
    """

    width: int
    height: int
    content: str
    pixels: str
    thumb: bytes | None = None
    pages: bool = False
    blank: bool = False
    transparent: bool = False


Stamp = str


def stamp(path: Path) -> Stamp | None:
    """What changes when the file does; None for a file that is not there or has only just been written."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL byte in the path
        return None
    if time.time_ns() - max(found.st_ctime_ns, found.st_mtime_ns) < SETTLED_NS:
        return None
    return f"{FORMAT}:{Image.__version__}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def _bytes_of(mark: Stamp) -> int:
    """The file's size, which is part of its stamp."""
    return int(mark.split(":")[2])


class KnownImages:
    """The facts of settled files in one small database. Every method does nothing once the database has failed."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file or cache_folder() / "images.sqlite"
        self._database: sqlite3.Connection | None = None
        with self._tolerating():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self._file, timeout=2.0)
            self._database.execute("PRAGMA synchronous = OFF")
            self._database.execute("CREATE TABLE IF NOT EXISTS images (path TEXT PRIMARY KEY, stamp TEXT, facts TEXT)")
            # Beside the facts of decoded pictures: width and height where only the header was read.
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS sizes (path TEXT PRIMARY KEY, stamp TEXT, width INTEGER, height INTEGER)"
            )

    def find(self, stamps: Mapping[Path, Stamp | None]) -> dict[Path, ImageFacts]:
        """The facts of those files that are as they were."""
        wanted = {str(path.absolute()): path for path, mark in stamps.items() if mark is not None}
        found: dict[Path, ImageFacts] = {}
        with self._tolerating():
            if self._database is not None:
                marks = ",".join("?" * len(wanted))
                rows = self._database.execute(f"SELECT * FROM images WHERE path IN ({marks})", list(wanted))
                for name, mark, facts in rows:
                    if mark == stamps[wanted[name]]:
                        found[wanted[name]] = ImageFacts(**json.loads(facts))
        return found

    def keep(self, stamps: Mapping[Path, Stamp | None], facts: Iterable[tuple[Path, ImageFacts]]) -> None:
        """Remember facts, thumbnails left out. `stamps` were taken before the files were read."""
        rows = [
            (str(path.absolute()), stamps[path], json.dumps({**asdict(fact), "thumb": None}))
            for path, fact in facts
            if stamps[path] is not None
        ]
        with self._tolerating():
            if self._database is not None and rows:
                with self._database:
                    self._database.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?)", rows)

    def find_sizes(self, stamps: Mapping[Path, Stamp | None]) -> dict[Path, tuple[int, int, int]]:
        """(width, height, bytes) of those files that are as they were, however they were looked at before."""
        wanted = {str(path.absolute()): path for path, mark in stamps.items() if mark is not None}
        names = list(wanted)
        found: dict[Path, tuple[int, int, int]] = {}
        with self._tolerating():
            for start in range(0, len(names) if self._database is not None else 0, _MOST_ASKED):
                asked = names[start : start + _MOST_ASKED]
                marks = ",".join("?" * len(asked))
                for name, mark, width, height in self._sizes(marks, asked):
                    if mark == stamps[wanted[name]]:
                        found[wanted[name]] = (width, height, _bytes_of(mark))
        return found

    def _sizes(self, marks: str, names: list[str]) -> list[tuple[str, Stamp, int, int]]:
        if self._database is None:
            return []
        sizes = self._database.execute(f"SELECT path, stamp, width, height FROM sizes WHERE path IN ({marks})", names)
        rows = list(sizes)
        for name, mark, text in self._database.execute(f"SELECT * FROM images WHERE path IN ({marks})", names):
            facts = json.loads(text)
            rows.append((name, mark, facts["width"], facts["height"]))
        return rows

    def keep_sizes(self, stamps: Mapping[Path, Stamp | None], sizes: Mapping[Path, tuple[int, int, int]]) -> None:
        """Remember (width, height, bytes) read from headers. `stamps` were taken before the files were read."""
        rows = [
            (str(path.absolute()), mark, width, height)
            for path, (width, height, _) in sizes.items()
            if (mark := stamps[path]) is not None
        ]
        with self._tolerating():
            if self._database is not None and rows:
                with self._database:
                    self._database.executemany("INSERT OR REPLACE INTO sizes VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    @contextlib.contextmanager
    def _tolerating(self) -> Iterator[None]:
        """A full disk, a lock held too long, or a damaged file end the use of the cache, not the scan."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            self.close()
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                with contextlib.suppress(OSError):
                    self._file.unlink()
