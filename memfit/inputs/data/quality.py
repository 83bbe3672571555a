"""Findings about usable data: copies, leaks, contradictions, odd answers, odd sizes. Nothing here removes a row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from memfit.inputs.data.answers import parse_answer
from memfit.inputs.data.scan import MOST_THUMBS, ImageFacts
from memfit.inputs.data.similar import near_duplicates
from memfit.inputs.data.split import sample_text
from memfit.inputs.data.stats import outliers
from memfit.specs.check import FieldStats, Finding, RowRef, Severity, Source
from memfit.specs.sample import Sample
from memfit.specs.workload import SampleCost

_EXAMPLES = 5
_MOST_ROWS = 1000  # rows named by one finding; its count is of all
_MOSTLY = 0.5  # share of JSON answers above which the others are taken for mistakes
_FEW = 20  # rows below which "always the same" and "seldom filled" mean nothing
_SELDOM = 0.5  # fill rate below which a field is noted


# Every finding: code -> (severity, what its count counts).
KINDS: dict[str, tuple[Severity, str]] = {
    "shared-image": ("error", "pictures in both train and eval: the evaluation would measure memory"),
    "shared-text": ("error", "samples without pictures in both train and eval"),
    "near-duplicate-train-eval": ("warning", "pairs of pictures that look the same, one in train, one in eval"),
    "near-duplicate-images": ("warning", "pairs of pictures that look the same: re-encoded, resized, or nearly alike"),
    "duplicate-images": ("warning", "files that are copies of another picture file"),
    "different-answers": ("warning", "groups of rows with the same pictures and question but different answers"),
    "answers-not-json": ("warning", "answers that are not JSON"),
    "mixed-types": ("warning", "fields that change their JSON type"),
    "blank-images": ("warning", "pictures of one single colour"),
    "several-pages": ("warning", "picture files with several frames or pages; only the first is used"),
    "transparent-images": ("note", "pictures with transparent pixels; the colour under them is used"),
    "repeated-samples": ("note", "samples that repeat another one"),
    "constant-field": ("note", "fields with one value everywhere: a model may answer without looking"),
    "seldom-filled": ("note", "fields that are empty or absent in most answers"),
    "outlier-image-sizes": ("note", "pictures with far more or fewer pixels than the rest"),
    "outlier-lengths": ("note", "samples far longer or shorter than the rest"),
    "not-searched": ("note", f"pictures not searched for near-duplicates (the first {MOST_THUMBS:,} were)"),
}


@dataclass(frozen=True)
class Item:
    """One usable sample with its side and the facts of its pictures. `cost` is None without an encoder."""

    source: Source
    sample: Sample
    pictures: tuple[ImageFacts, ...]
    cost: SampleCost | None = None

    @property
    def ref(self) -> RowRef:
        return RowRef(self.source, self.sample.row)

    @property
    def keys(self) -> tuple[str, ...]:
        """What the pictures show: the hashes of their pixels."""
        return tuple(facts.pixels for facts in self.pictures)


@dataclass(frozen=True)
class _Picture:
    """One picture, however many files and rows hold it."""

    facts: ImageFacts
    files: tuple[Path, ...]
    refs: tuple[RowRef, ...]

    @property
    def sides(self) -> set[Source]:
        return {ref.source for ref in self.refs}


def find_all(items: Sequence[Item], fields: Sequence[FieldStats]) -> tuple[Finding, ...]:
    """Every finding, errors first. `fields` are the statistics of the training answers."""
    pictures = _pictures(items)
    found = [
        *_leaks(items, pictures),
        *_copies(pictures),
        *_near(pictures),
        *_repeated(items),
        *_answers(items),
        *_odd_fields(fields),
        *_odd_pictures(pictures),
        *_odd_sizes(items, pictures),
    ]
    order = {"error": 0, "warning": 1, "note": 2}
    return tuple(sorted(found, key=lambda finding: order[finding.severity]))


def _pictures(items: Iterable[Item]) -> dict[str, _Picture]:
    files: dict[str, dict[Path, None]] = defaultdict(dict)
    refs: dict[str, dict[RowRef, None]] = defaultdict(dict)
    facts: dict[str, ImageFacts] = {}
    for item in items:
        for key, path, fact in zip(item.keys, item.sample.images, item.pictures, strict=True):
            files[key][path] = None
            refs[key][item.ref] = None
            facts.setdefault(key, fact)
    return {key: _Picture(facts[key], tuple(files[key]), tuple(refs[key])) for key in facts}


def _finding(
    code: str, refs: Sequence[RowRef], examples: Sequence[str] = (), count: int | None = None, note: str = ""
) -> list[Finding]:
    """A list with one finding, or an empty one when it concerns nothing. Without `count`, the `refs` are counted."""
    severity, summary = KINDS[code]
    number = len(refs) if count is None else count
    rows, shown = tuple(refs[:_MOST_ROWS]), tuple(examples[:_EXAMPLES])
    return [Finding(code, severity, number, summary + note, rows, shown)] if number else []


def _unique(pictures: Iterable[_Picture]) -> list[RowRef]:
    """The rows that show any of `pictures`, each once."""
    return list(dict.fromkeys(ref for picture in pictures for ref in picture.refs))


def _names(refs: Sequence[RowRef]) -> str:
    return ", ".join(ref.text for ref in refs[:_EXAMPLES]) + (" ..." if len(refs) > _EXAMPLES else "")


# ---------------------------------------------------------------- the same picture, or nearly


def _leaks(items: Sequence[Item], pictures: Mapping[str, _Picture]) -> list[Finding]:
    """Pictures, and samples without pictures, that stand on both sides: evaluation would measure memory."""
    shared = [picture for picture in pictures.values() if len(picture.sides) == 2]
    refs = sorted({ref for p in shared for ref in p.refs if ref.source == "eval"}, key=lambda ref: ref.row)
    examples = [f"{p.files[0].name}: {_names(_one_of_each(p.refs))}" for p in shared]
    found = _finding("shared-image", refs, examples, len(shared))
    texts: dict[str, list[RowRef]] = defaultdict(list)
    for item in items:
        if not item.pictures:
            texts[sample_text(item.sample)].append(item.ref)
    both = [group for group in texts.values() if len({ref.source for ref in group}) == 2]
    refs = [ref for group in both for ref in group if ref.source == "eval"]
    return found + _finding("shared-text", refs, [_names(group) for group in both], len(both))


def _one_of_each(refs: Sequence[RowRef]) -> list[RowRef]:
    first: dict[Source, RowRef] = {}
    for ref in refs:
        first.setdefault(ref.source, ref)
    return list(first.values())


def _copies(pictures: Mapping[str, _Picture]) -> list[Finding]:
    """The same pixels under several file names. (One file in several rows is usual: several questions about it.)"""
    groups = [picture for picture in pictures.values() if len(picture.files) > 1]
    surplus = sum(len(picture.files) - 1 for picture in groups)
    examples = [
        " = ".join(path.name for path in picture.files[:3]) + f" ({_names(picture.refs)})" for picture in groups
    ]
    return _finding("duplicate-images", _unique(groups), examples, surplus)


def _near(pictures: Mapping[str, _Picture]) -> list[Finding]:
    """Different pixels that look the same. Pictures of one colour are left out: they are found as blank."""
    usable = [p for p in pictures.values() if p.facts.thumb is not None and not p.facts.blank]
    pairs = near_duplicates(
        [picture.facts.thumb or b"" for picture in usable], [(p.facts.width, p.facts.height) for p in usable]
    )
    crossing = [(i, j) for i, j in pairs if len(usable[i].sides | usable[j].sides) == 2]
    across = set(crossing)
    inside = [pair for pair in pairs if pair not in across]
    found = []
    for code, chosen in (("near-duplicate-train-eval", crossing), ("near-duplicate-images", inside)):
        refs = _unique(usable[index] for pair in chosen for index in pair)
        examples = [f"{usable[i].files[0].name} ~ {usable[j].files[0].name}" for i, j in chosen]
        found += _finding(code, refs, examples, len(chosen))
    return found + _finding("not-searched", [], (), sum(p.facts.thumb is None for p in pictures.values()))


# ---------------------------------------------------------------- questions and answers


def _repeated(items: Sequence[Item]) -> list[Finding]:
    """The same pictures and question twice: with the same answer a repetition, with another a contradiction."""
    groups: dict[Hashable, list[Item]] = defaultdict(list)
    for item in items:
        groups[(item.source, item.keys, _question(item.sample))].append(item)
    several = [group for group in groups.values() if len(group) > 1]
    clashing = [group for group in several if _answers_differ(group)]
    same = [group for group in several if not _answers_differ(group)]
    rows = [item.ref for group in clashing for item in group]
    clashes = [f"{_names([item.ref for item in g])}: {_clip(g[0])} / {_clip(_other(g))}" for g in clashing]
    surplus = [item.ref for group in same for item in group[1:]]
    return [
        *_finding("different-answers", rows, clashes, len(clashing)),
        *_finding("repeated-samples", surplus, [_names([item.ref for item in group]) for group in same]),
    ]


def _answers_differ(group: Sequence[Item]) -> bool:
    return len({item.sample.answer.strip() for item in group}) > 1


def _question(sample: Sample) -> str:
    """Everything before the last answer."""
    last = max(index for index, turn in enumerate(sample.turns) if turn.role == "assistant")
    return "\n".join(f"{turn.role}:{turn.text}" for turn in sample.turns[:last])


def _other(group: Sequence[Item]) -> Item:
    return next(item for item in group if item.sample.answer.strip() != group[0].sample.answer.strip())


def _clip(item: Item, length: int = 40) -> str:
    text = " ".join(item.sample.answer.split())
    return repr(text if len(text) <= length else text[:length] + "...")


def _answers(items: Sequence[Item]) -> list[Finding]:
    """Answers that are no JSON where most are."""
    if not items:
        return []
    plain = [item for item in items if parse_answer(item.sample.answer) is None]
    if not plain or len(plain) >= (1 - _MOSTLY) * len(items):
        return []
    fenced = sum(item.sample.answer.strip().startswith("```") for item in plain)
    note = f", while {len(items) - len(plain):,} are" + (f" ({fenced:,} stand inside ``` marks)" if fenced else "")
    examples = [f"{item.ref.text}: {_clip(item)}" for item in plain]
    return _finding("answers-not-json", [item.ref for item in plain], examples, note=note)


def _odd_fields(fields: Sequence[FieldStats]) -> list[Finding]:
    """Fields that teach nothing, are seldom filled, or change their type."""
    enough = [stats for stats in fields if stats.possible >= _FEW]
    constant = [s for s in enough if s.distinct == 1 and s.filled == s.possible and not s.distinct_capped]
    seldom = [s for s in enough if s.fill_rate < _SELDOM]
    mixed = [s for s in fields if len(s.types) > 1]
    types = [f"{s.path}: " + ", ".join(f"{number:,} x {name}" for name, number in s.types.items()) for s in mixed]
    rates = [f"{s.path}: {s.filled:,} of {s.possible:,}" for s in seldom]
    return [
        *_finding("constant-field", [], [f"{s.path} = {s.top_value}" for s in constant], len(constant)),
        *_finding("seldom-filled", [], rates, len(seldom)),
        *_finding("mixed-types", [], types, len(mixed)),
    ]


# ---------------------------------------------------------------- odd pictures and sizes


def _odd_pictures(pictures: Mapping[str, _Picture]) -> list[Finding]:
    flags = {"blank-images": "blank", "several-pages": "pages", "transparent-images": "transparent"}
    found = []
    for code, flag in flags.items():
        odd = [picture for picture in pictures.values() if getattr(picture.facts, flag)]
        found += _finding(code, _unique(odd), [picture.files[0].name for picture in odd], len(odd))
    return found


def _odd_sizes(items: Sequence[Item], pictures: Mapping[str, _Picture]) -> list[Finding]:
    """Pictures and samples whose size is far from the rest's: at least a factor of 4 and 3.5 robust deviations."""
    every = list(pictures.values())
    far = [every[i] for i in outliers([p.facts.width * p.facts.height for p in every])]
    sizes = [f"{p.files[0].name}: {p.facts.width} x {p.facts.height}" for p in far]
    unit = "tokens" if all(item.cost is not None for item in items) else "characters"
    lengths = [item.cost.tokens if item.cost is not None else len(sample_text(item.sample)) for item in items]
    odd = [(items[i].ref, lengths[i]) for i in outliers(lengths)]
    return [
        *_finding("outlier-image-sizes", _unique(far), sizes, len(far)),
        *_finding("outlier-lengths", [ref for ref, _ in odd], [f"{ref.text}: {n:,} {unit}" for ref, n in odd]),
    ]
