"""The user's data in the model's own units, from headers and words: no picture is decoded.

Rows stream through in pieces; what stays is a few integers a sample. Held out rows are counted too: which ones they are
is known only after pictures have been decoded, so the worst batch here is at least that of training. A scan of what has
not changed is read from the cache.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memfit.errors import UserError
from memfit.families.budget import budget_text
from memfit.inputs.data.counted import Counted, count_key, load_count, store_count
from memfit.inputs.data.draft import RowError
from memfit.inputs.data.examine import (
    SampleEncoder,
    data_path,
    first_of_shuffle,
    fit_row,
    read_row,
    sizes_of,
    with_format,
)
from memfit.inputs.data.headers import HeaderReader, ImageHeader, header_reader
from memfit.inputs.data.load import first_reasons
from memfit.inputs.data.paths import DataRoot
from memfit.inputs.data.scan import Progress
from memfit.inputs.data.stats import distribution
from memfit.inputs.encode import Encoder
from memfit.specs.check import Broken
from memfit.specs.recipe import ImageBudget, Recipe
from memfit.specs.sample import Sample
from memfit.specs.workload_scan import FIGURES, Cut, WorkloadScan

_PIECE = 256  # rows in memory at a time


def scan_workload(recipe: Recipe, encoder: SampleEncoder, progress: Progress | None = None) -> WorkloadScan:
    """Count tokens, image tokens, crops, patches and bytes of every sample of `data.train`, from headers alone.

    `progress(what, done, total)` is called between pieces; the total is None while a file is read to its end. Raises
    UserError when the file cannot be read or holds no usable row. `data.limit` keeps the rows that training would keep.
    """
    path = data_path(recipe.data, "train")
    key = count_key(recipe, path, encoder)
    found = load_count(key) if key is not None else None
    if found is None:
        found = Counted()
        with header_reader() as reader:
            entries, total = _entries(recipe, path)
            for piece in _read_ahead(_batched(entries), reader):
                _count(found, piece, (encoder, _limit(recipe)), reader)
                if progress:
                    progress("samples", len(found.rows) + len(found.broken), total)
            found.images = len(reader.seen)
            if key is not None:
                store_count(key, found, reader.seen)
    if not found.rows:
        rows = len(found.broken)
        raise UserError(
            f"{path}: none of {rows:,} rows can be used{first_reasons(found.broken)}",
            "memfit check lists every broken row with its reason",
        )
    return _scan(recipe, path, found)


def cut_by_image(scan: WorkloadScan, recipe: Recipe, encoder: Encoder, budget: ImageBudget) -> Cut:
    """What another image budget would take from `scan`, which is `recipe`'s under its own; every sample is counted.

    Raises UserError for a budget that the model's processor cannot meet.
    """
    smaller = scan_workload(dataclasses.replace(recipe, image=budget), Encoder(encoder.source, budget))
    return scan.cut_to(smaller, budget_text(budget))


def cut_by_length(scan: WorkloadScan, recipe: Recipe, encoder: SampleEncoder, max_length: int) -> Cut:
    """What `max_length` would take from `scan`, which is `recipe`'s under its own: every sample is counted again.

    Samples that no leaving out of turns brings under it count with all their tokens.
    """
    budget = f"max_length: {max_length}"
    try:
        return scan.cut_to(scan_workload(dataclasses.replace(recipe, max_length=max_length), encoder), budget)
    except UserError:  # nothing at all fits
        return scan.cut_by_length(max_length)


def _entries(recipe: Recipe, path: Path) -> tuple[Iterator[tuple[Sample | Broken, int]], int | None]:
    """Samples and broken rows with their lines, and how many there are where that is known."""
    data = recipe.data
    root = DataRoot(Path(data.image_root) if data.image_root is not None else path.parent)
    form, rows = with_format(path, data.format)
    ignored: Counter[str] = Counter()
    entries = ((read_row(row, form, root, "train", ignored), row.line) for row in rows)
    if data.limit is None:
        return entries, None
    chosen = first_of_shuffle(list(entries), data.limit, recipe.seed, root)
    return iter(chosen), len(chosen)


def _batched(entries: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """itertools.batched of Python 3.12."""
    waiting = iter(entries)
    while piece := tuple(itertools.islice(waiting, _PIECE)):
        yield piece


def _read_ahead(
    pieces: Iterable[tuple[tuple[Sample | Broken, int], ...]], reader: HeaderReader
) -> Iterator[tuple[tuple[Sample | Broken, int], ...]]:
    """The pieces, with the headers of the next one being read while one is counted."""
    waiting = None
    for piece in pieces:
        reader.start(_images(piece))
        if waiting is not None:
            yield waiting
        waiting = piece
    if waiting is not None:
        yield waiting


def _images(piece: Iterable[tuple[Sample | Broken, int]]) -> list[Path]:
    return [image for entry, _ in piece if isinstance(entry, Sample) for image in entry.images]


def _limit(recipe: Recipe) -> int | None:
    return recipe.max_length if isinstance(recipe.max_length, int) else None


def _count(
    found: Counted,
    piece: Sequence[tuple[Sample | Broken, int]],
    under: tuple[SampleEncoder, int | None],
    reader: HeaderReader,
) -> None:
    """Count a piece `under` an encoder and a length. What cannot be brought under the length is counted whole."""
    headers = reader.read(_images(piece))
    for entry, line in piece:
        if isinstance(entry, Broken):
            found.broken.append(entry)
            continue
        try:
            fitted = fit_row(under[0], entry, sizes_of(headers, entry), under[1])
        except RowError as error:
            found.broken.append(Broken(entry.row, entry.id, error.reason, error.detail, line))
            continue
        found.shortened += [fitted.shortened] if fitted.shortened is not None else []
        mine = [header for path in fitted.sample.images if isinstance(header := headers[path], ImageHeader)]
        found.add(fitted.sample, fitted.encoded, fitted.cost, mine)


def _scan(recipe: Recipe, path: Path, found: Counted) -> WorkloadScan:
    limit = _limit(recipe)
    figures = {name: np.array(values, dtype=np.int64) for name, values in found.figures.items()}
    inside = np.ones(len(found.rows), dtype=bool) if limit is None else figures["tokens"] <= limit
    if not inside.any():
        least = int(figures["tokens"].min())
        raise UserError(
            f"max_length: {limit} is below every sample of {path}: the shortest has {least:,} tokens, and none can be "
            "brought under it by leaving out whole turns",
            "a larger max_length, or a smaller image budget (image.max_slices, image.max_pixels, image.max_tokens)",
        )
    made = (distribution(name, figures[name][inside]) for name in FIGURES)
    return WorkloadScan(
        path=str(path),
        images=found.images,
        figures=figures,
        rows=np.array(found.rows, dtype=np.int64),
        ids=tuple(found.ids),
        kinds=np.array(found.kinds, dtype=np.int64),
        pictures=tuple(found.pictures),
        distributions=tuple(one for one in made if one is not None),
        broken=tuple(found.broken),
        max_length=limit,
        shortened=tuple(found.shortened),
        reading=found.reading,
    )
