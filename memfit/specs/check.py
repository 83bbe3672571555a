"""Results of reading and checking data: broken rows, findings, the split, the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from memfit.specs.sample import Sample
from memfit.specs.workload import SampleCost, Workload

Source = Literal["train", "eval"]
Severity = Literal["error", "warning", "note"]
Verdict = Literal["ok", "warnings", "refused"]

# Why a row cannot be used. The codes are stable: the quarantine file and `check --json` carry them.
REASONS: dict[str, str] = {
    "bad-json": "the line is not JSON",
    "bad-row": "the row does not have the shape of its format",
    "unknown-key": "a needed key is misspelt",
    "no-assistant-turn": "nothing to learn from: no assistant turn",
    "empty-answer": "an assistant turn without text",
    "turn-order": "the conversation does not start with the user or does not end with the assistant",
    "placeholder-count": "placeholders and pictures do not agree",
    "remote-image": "the picture is an address or inline data, not a file",
    "outside-root": "the picture lies outside the data root",
    "missing-image": "no such picture file",
    "unreadable-image": "the file is no picture that can be read",
    "truncated-image": "the picture file is cut off or damaged",
    "oversized-image": "the picture has more pixels than memfit decodes",
    "special-token-in-text": "the text spells one of the model's own control tokens",
    "too-long": "longer than max_length, and so is its shortest beginning that ends with an answer",
    "cannot-encode": "the model cannot take the conversation: its chat template or its image rule refuses",
}


@dataclass(frozen=True)
class Broken:
    """One row that cannot be used. `row` is its 0-based position, `line` the 1-based line it begins on.

    `reason` is a key of REASONS, `detail` says what stands there.
    """

    row: int
    id: str
    reason: str
    detail: str
    line: int | None = None
    source: Source = "train"

    @property
    def text(self) -> str:
        """`row 17 (line 18): missing-image: images/17.png does not exist`."""
        line = f" (line {self.line})" if self.line is not None else ""
        return f"{self.source} row {self.row}{line}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class Shortened:
    """One sample above max_length that is used without some of its turns.

    `tokens` are those of the whole conversation, `kept_tokens` those that are used; `turns` and `images` are left out.
    """

    row: int
    id: str
    tokens: int
    kept_tokens: int
    turns: int
    images: int
    source: Source = "train"

    @property
    def text(self) -> str:
        """`train row 17: 2,310 tokens, 1,904 used; left out: 4 turns with 1 picture`."""
        pictures = f" with {self.images} picture{'s' * (self.images != 1)}" if self.images else ""
        left = f"{self.turns} turn{'s' * (self.turns != 1)}{pictures}"
        return f"{self.source} row {self.row}: {self.tokens:,} tokens, {self.kept_tokens:,} used; left out: {left}"


def shortened_text(rows: Sequence[Shortened], samples: int, max_length: int | None) -> str:
    """What max_length takes from `samples` samples, in one line; empty where it takes nothing."""
    if not rows:
        return ""
    turns, images = sum(row.turns for row in rows), sum(row.images for row in rows)
    lost = sum(row.tokens - row.kept_tokens for row in rows)
    pictures = f" with {images:,} picture{'s' * (images != 1)}" if images else ""
    limit = "" if max_length is None else f" {max_length:,}"
    return (
        f"max_length{limit} shortens {len(rows):,} of {samples:,} samples: {turns:,} whole turns{pictures} "
        f"({lost:,} tokens) are left out"
    )


@dataclass(frozen=True)
class RowRef:
    """A row of one of the two data sets, for a finding's examples."""

    source: Source
    row: int

    @property
    def text(self) -> str:
        return f"{self.source} row {self.row}"


@dataclass(frozen=True)
class Finding:
    """One thing about the data's quality. `summary` says what is counted; `rows` names at most 1,000 of them."""

    code: str
    severity: Severity
    count: int
    summary: str
    rows: tuple[RowRef, ...] = ()
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Distribution:
    """Numbers of one kind: `counts[i]` of them lie in [edges[i], edges[i+1]), the last bin includes its upper edge."""

    name: str
    count: int
    mean: float
    minimum: float
    p50: float
    p90: float
    p99: float
    maximum: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class FieldStats:
    """One field of the JSON answers. `path` is dotted, `[]` stands for the elements of a list.

    `filled` of `possible` places hold a value (null, "", [] and {} do not count). `distinct` counts different values,
    a lower bound when `distinct_capped`. `types` counts the JSON types of the filled values.
    """

    path: str
    possible: int
    filled: int
    distinct: int
    distinct_capped: bool
    top_value: str
    top_count: int
    types: Mapping[str, int]

    @property
    def fill_rate(self) -> float:
        return self.filled / self.possible if self.possible else 0.0


@dataclass(frozen=True)
class FileSummary:
    """One data file. `ignored_keys` are keys of the rows that the format does not know: key -> number of rows."""

    source: Source
    path: str
    format: str
    format_detected: bool
    rows: int
    used: int
    broken: int
    ignored_keys: Mapping[str, int] = field(default_factory=dict)

    @property
    def broken_share(self) -> float:
        return self.broken / self.rows if self.rows else 0.0


@dataclass(frozen=True)
class ImageSummary:
    """The picture files that the usable and the broken rows name. `decoded` of `files` were read to the last pixel."""

    files: int
    decoded: int
    broken: int
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None


@dataclass(frozen=True)
class Split:
    """Which rows of the training file train and which are held out, as 0-based row numbers in ascending order.

    `kind` is "file" (evaluation has its own file; `eval` is then empty), "share" or "none".
    """

    kind: Literal["file", "share", "none"]
    train: tuple[int, ...]
    eval: tuple[int, ...] = ()
    share: float | None = None
    seed: int = 0
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        return data | {"train": list(self.train), "eval": list(self.eval)}


@dataclass(frozen=True)
class Loaded:
    """The samples that training uses. `train_costs` runs parallel to `train`; it is empty when no encoder was given.

    `shortened` are those of either side that max_length has taken turns from. `reading`: bytes that the largest
    picture takes while it is read; `most_pixels`: its width x height.
    """

    train: tuple[Sample, ...]
    eval: tuple[Sample, ...]
    broken: tuple[Broken, ...]
    split: Split
    train_costs: tuple[SampleCost, ...] = ()
    eval_costs: tuple[SampleCost, ...] = ()
    shortened: tuple[Shortened, ...] = ()
    reading: int = 0
    most_pixels: int = 0


def loaded_lines(loaded: Loaded, max_length: int | None) -> list[str]:
    """What a person is told of samples that are used otherwise than they stand in the file, or not at all."""
    lines = []
    used = len(loaded.train) + len(loaded.eval)
    if loaded.broken:
        kinds = ", ".join(f"{count:,} {reason}" for reason, count in reason_counts(loaded.broken).items())
        rows = "row is" if len(loaded.broken) == 1 else "rows are"
        lines.append(f"{len(loaded.broken):,} broken {rows} left out ({kinds}); memfit check lists them")
    if loaded.shortened:
        lines.append(shortened_text(loaded.shortened, used, max_length))
    return lines


def reason_counts(broken: Sequence[Broken]) -> dict[str, int]:
    """Broken rows by reason, the commonest first."""
    counts: dict[str, int] = {}
    for row in broken:
        counts[row.reason] = counts.get(row.reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True)
class RankedSample:
    """One of the most expensive samples; `by` names the figure that it tops."""

    by: str
    ref: RowRef
    id: str
    cost: SampleCost
    image_sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CheckReport:
    """What `memfit check` found. `refusals` are the one-line reasons for a verdict of "refused".

    `distributions` and `worst` are empty and `workload` is None when no encoder was given.
    """

    verdict: Verdict
    refusals: tuple[str, ...]
    files: tuple[FileSummary, ...]
    max_broken: float
    train_samples: int
    eval_samples: int
    split: Split
    broken: tuple[Broken, ...]
    quarantine: tuple[str, ...]
    images: ImageSummary
    findings: tuple[Finding, ...]
    fields: tuple[FieldStats, ...]
    fields_left_out: int
    distributions: tuple[Distribution, ...]
    worst: tuple[RankedSample, ...]
    workload: Workload | None
    schema: int = 1
    shortened: tuple[Shortened, ...] = ()
    max_length: int | None = None

    def reason_counts(self) -> dict[str, int]:
        """Broken rows by reason, the commonest first."""
        return reason_counts(self.broken)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values. The split is given as its numbers of rows; `Split.to_json` holds the rows."""
        data = asdict(self)
        data["split"] = {
            "kind": self.split.kind,
            "train": len(self.split.train),
            "eval": len(self.split.eval),
            "share": self.split.share,
            "seed": self.split.seed,
            "note": self.split.note,
        }
        data["reasons"] = self.reason_counts()
        for entry, stats in zip(data["fields"], self.fields, strict=True):
            entry["fill_rate"] = stats.fill_rate
        for entry, summary in zip(data["files"], self.files, strict=True):
            entry["broken_share"] = summary.broken_share
        return data
