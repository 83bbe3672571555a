"""From one data file to usable samples and broken rows: what checking and training share, so that both see the same."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from memfit.errors import UserError
from memfit.inputs.data.draft import RowError
from memfit.inputs.data.formats import READERS, detect_format
from memfit.inputs.data.paths import DataRoot
from memfit.inputs.data.rows import Row, read_rows
from memfit.inputs.data.scan import ImageFacts, ImageProblem, Progress, Scan, scan_images
from memfit.inputs.data.split import rank, sample_text
from memfit.inputs.shorten import TooLongError, shortened
from memfit.specs.check import Broken, Shortened, Source
from memfit.specs.recipe import Data
from memfit.specs.sample import Sample
from memfit.specs.workload import SampleCost

_HEAD = 1000  # rows that the format is detected from
TELL_EVERY = 500  # rows between two calls of the progress function


class SampleEncoder(Protocol):
    """What is asked of `memfit.inputs.encode.Encoder` here. `encode` raises UserError for what cannot be encoded."""

    def encode(self, sample: Sample, sizes: Sequence[tuple[int, int]]) -> Any: ...

    def sample_cost(self, encoded: Any) -> SampleCost: ...

    def special_tokens_in(self, text: str) -> Sequence[str]: ...


@dataclass(frozen=True)
class CheckOptions:
    """How to read the data. `seed` is the recipe's; `max_length` its number, or None for no limit.

    `quarantine`: the folder for the quarantine files, None for none. `workers`: threads that decode pictures, None for
    as many as there are processors (at most 8).
    """

    seed: int = 0
    max_length: int | None = None
    quarantine: Path | None = None
    workers: int | None = None
    progress: Progress | None = None


@dataclass
class Examined:
    """One data file. `costs` runs parallel to `samples`, and is empty without an encoder.

    `whole` holds the samples that `shortened` names as they stand in the file, by row.
    """

    source: Source
    path: Path
    format: str
    detected: bool
    rows: int
    samples: list[Sample] = field(default_factory=list)
    costs: list[SampleCost] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    scan: Scan = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    wider_root: str | None = None
    shortened: list[Shortened] = field(default_factory=list)
    whole: dict[int, Sample] = field(default_factory=dict)

    def facts(self, path: Path) -> ImageFacts:
        """The facts of a picture of one of `samples`."""
        found = self.scan[path]
        assert isinstance(found, ImageFacts), "a sample with a broken picture is no sample"
        return found


def data_path(data: Data, source: Source) -> Path:
    """The file that holds the samples of `source`."""
    if data.train is None:
        raise UserError("data.train: no data file is given", "data: {train: path/to/data.json}")
    return Path(data.train if source == "train" else str(data.eval))


def examine(
    data: Data, source: Source, options: CheckOptions, encoder: SampleEncoder | None = None, thumbs: bool = False
) -> Examined:
    """Read the file of `source`, decode its pictures once (keeping thumbnails if asked), count its tokens.

    `data.limit` keeps the first N rows of a seeded shuffle, of the training file only. UserError for a file that
    cannot be read.
    """
    path = data_path(data, source)
    root = DataRoot(Path(data.image_root) if data.image_root is not None else path.parent)
    form, rows = with_format(path, data.format)
    result = Examined(source, path, form, data.format == "auto", 0)
    entries: list[tuple[Sample | Broken, int]] = []
    for row in rows:
        entries.append((read_row(row, form, root, source, result.ignored), row.line))
        if options.progress and row.number % TELL_EVERY == 0:
            options.progress("rows", row.number, None)
    if source == "train" and data.limit is not None:
        entries = first_of_shuffle(entries, data.limit, options.seed, root)
    result.rows = len(entries)
    result.wider_root = root.wider_root()
    wanted = (image for entry, _ in entries if isinstance(entry, Sample) for image in entry.images)
    result.scan = scan_images(wanted, thumbs, options.workers, options.progress)
    for number, (entry, line) in enumerate(entries):
        _sort_in(result, entry, line, encoder, options.max_length)
        if options.progress and encoder is not None and (number % TELL_EVERY == 0 or number + 1 == len(entries)):
            options.progress("tokens", number + 1, len(entries))
    return result


def with_format(path: Path, wanted: str) -> tuple[str, Iterator[Row]]:
    """The format of a data file ("auto" looks at its first rows) and its rows. UserError for an unknown one."""
    rows = read_rows(path)
    if wanted != "auto":
        if wanted not in READERS:
            raise UserError(f"data.format: {wanted!r} is not known", f"one of auto, {', '.join(READERS)}")
        return wanted, rows
    head = list(itertools.islice(rows, _HEAD))
    form = detect_format((row.value for row in head if row.problem is None), str(path))
    return form, itertools.chain(head, rows)


def read_row(row: Row, form: str, root: DataRoot, source: Source, ignored: Counter[str]) -> Sample | Broken:
    """One row as a sample with its pictures' paths, or why it is none. `ignored` counts keys that say nothing here."""
    name = str(row.number)
    try:
        if row.problem is not None:
            raise RowError("bad-json", row.problem)
        if not isinstance(row.value, Mapping):
            raise RowError("bad-row", f"a row must be an object, it is {type(row.value).__name__}")
        name = str(row.value.get("id", name))
        draft = READERS[form].read(row.value)
        ignored.update(draft.ignored)
        images = tuple(root.resolve(reference) for reference in draft.images)
        return Sample(name, row.number, draft.turns, images)
    except RowError as error:
        return Broken(row.number, name, error.reason, error.detail, row.line, source)


def first_of_shuffle(
    entries: list[tuple[Sample | Broken, int]], limit: int, seed: int, root: DataRoot
) -> list[tuple[Sample | Broken, int]]:
    """`limit` entries drawn by `seed`, in the file's order. Neither that nor the folder's place decides which ones."""

    def key(item: tuple[Sample | Broken, int]) -> bytes:
        entry = item[0]
        if isinstance(entry, Broken):
            return rank(seed, "broken", entry.id, entry.reason)
        return rank(seed, sample_text(entry), *(root.relative(image) for image in entry.images))

    return sorted(sorted(entries, key=key)[:limit], key=lambda item: item[0].row)


def _sort_in(
    result: Examined, entry: Sample | Broken, line: int, encoder: SampleEncoder | None, max_length: int | None
) -> None:
    """Put one row where it belongs: among the samples with its cost, or among the broken."""
    if isinstance(entry, Broken):
        result.broken.append(entry)
        return
    try:
        sizes = sizes_of(result.scan, entry)
        if encoder is None:
            result.samples.append(entry)
            return
        fitted = fit_row(encoder, entry, sizes, max_length)
        if fitted.problem is not None:
            raise RowError("too-long", fitted.problem)
        result.costs.append(fitted.cost)
        result.samples.append(fitted.sample)
        if fitted.shortened is not None:
            result.shortened.append(dataclasses.replace(fitted.shortened, source=result.source))
            result.whole[entry.row] = entry
    except RowError as error:
        result.broken.append(Broken(entry.row, entry.id, error.reason, error.detail, line, result.source))


def sizes_of(scan: Mapping[Path, Any], sample: Sample) -> list[tuple[int, int]]:
    """(width, height) of a sample's pictures, from facts or headers. Raises RowError with the first that has none."""
    sizes, problems = [], []
    for path in sample.images:
        facts = scan[path]
        if isinstance(facts, ImageProblem):
            problems.append(facts)
        else:
            sizes.append((facts.width, facts.height))
    if problems:
        more = f" (and {len(problems) - 1} more of its pictures)" if len(problems) > 1 else ""
        raise RowError(problems[0].reason, problems[0].detail + more)
    return sizes


@dataclass(frozen=True)
class Fitted:
    """One row under the length limit: the sample as it is used, what the encoder says of it, and what was left out.

    `problem` says why the row cannot be brought under the limit; the sample is then whole.
    """

    sample: Sample
    encoded: Any
    cost: SampleCost
    shortened: Shortened | None = None
    problem: str | None = None


def fit_row(encoder: SampleEncoder, sample: Sample, sizes: Sequence[tuple[int, int]], max_length: int | None) -> Fitted:
    """A sample, without some of its turns where it is above `max_length`. RowError where it cannot be encoded."""
    encoded = encode_row(encoder, sample, sizes)
    cost = encoder.sample_cost(encoded)
    if max_length is None or cost.tokens <= max_length:
        return Fitted(sample, encoded, cost)
    try:
        part, encoded_part = shortened(encoder, sample, sizes, max_length)
    except TooLongError as error:
        pictures = f", {cost.image_tokens:,} of them pictures" if cost.image_tokens else ""
        first = f", {error.tokens:,} up to the first answer" if error.tokens < cost.tokens else ""
        return Fitted(
            sample, encoded, cost, problem=f"{cost.tokens:,} tokens{pictures}{first}; max_length is {max_length:,}"
        )
    except UserError as error:
        raise _cannot_encode(sample, error) from error
    kept = encoder.sample_cost(encoded_part)
    turns, images = len(sample.turns) - len(part.turns), len(sample.images) - len(part.images)
    what = Shortened(sample.row, sample.id, cost.tokens, kept.tokens, turns, images)
    return Fitted(part, encoded_part, kept, what)


def encode_row(encoder: SampleEncoder, sample: Sample, sizes: Sequence[tuple[int, int]]) -> Any:
    """What `encoder.encode` returns. Raises RowError for control tokens in words, and what the model cannot take."""
    for index, turn in enumerate(sample.turns):
        found = encoder.special_tokens_in(turn.text)
        if found:
            words = ", ".join(repr(word) for word in dict.fromkeys(found))
            raise RowError("special-token-in-text", f"turn {index} ({turn.role}) spells {words}")
    try:
        return encoder.encode(sample, sizes)
    except UserError as error:
        raise _cannot_encode(sample, error) from error


def _cannot_encode(sample: Sample, error: UserError) -> RowError:
    return RowError("cannot-encode", f"{error.problem.removeprefix(f'row {sample.row}: ')} ({error.hint})")
