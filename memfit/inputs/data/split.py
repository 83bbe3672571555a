"""Hold out a share of the samples so that no picture is on both sides, whatever the order of the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from memfit.inputs.data.scan import ImageFacts, ImageProblem
from memfit.specs.check import Split
from memfit.specs.sample import Sample


def sample_text(sample: Sample) -> str:
    """Everything that is said in the sample, with its roles; a picture is a NUL."""
    return "\n".join(
        f"{turn.role}:" + "".join(piece if isinstance(piece, str) else "\0" for piece in turn.pieces)
        for turn in sample.turns
    )


def rank(seed: int, *parts: str) -> bytes:
    """A number drawn by `seed` for what `parts` say: sorting by it shuffles, whatever the order of the rows was."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=16)
    for part in parts:
        digest.update(b"\0" + part.encode("utf-8", "surrogatepass"))
    return digest.digest()


def file_keys(sample: Sample, scan: Mapping[Path, ImageFacts | ImageProblem]) -> list[str]:
    """What identifies the sample on every machine: the hashes of its pictures' files; of its text when it has none."""
    return [facts.content for facts in _facts(sample, scan)] or [_text_key(sample)]


def pixel_keys(sample: Sample, scan: Mapping[Path, ImageFacts | ImageProblem]) -> list[str]:
    """What the sample shows, in whatever file: the hashes of its pictures' pixels; of its text when it has none."""
    return [facts.pixels for facts in _facts(sample, scan)] or [_text_key(sample)]


def _facts(sample: Sample, scan: Mapping[Path, ImageFacts | ImageProblem]) -> list[ImageFacts]:
    found = [scan[path] for path in sample.images]
    good = [facts for facts in found if isinstance(facts, ImageFacts)]
    assert len(good) == len(found), "a sample with a broken picture is no sample"
    return good


def _text_key(sample: Sample) -> str:
    return "text:" + rank(0, sample_text(sample)).hex()


def split_share(
    rows: Sequence[int], keys: Sequence[Sequence[str]], share: float, seed: int, links: Sequence[Sequence[str]] = ()
) -> Split:
    """Hold out about `share` of the samples. `rows` are their row numbers, `keys` what each shows (`file_keys`).

    Samples that share any key, or any of `links` (`pixel_keys`), directly or through others, form a group and stay
    together. Groups are drawn in an order that depends on `seed` and their keys alone, and taken while they fit into
    round(share x samples), at least one sample; the smallest group is taken when none fits. Something is always left
    for training, so a single group is not split.
    """
    if not rows:
        return Split("share", (), (), share, seed)
    groups = _groups([*keys, *links], len(rows))
    order = sorted(groups, key=lambda group: rank(seed, min(key for index in group for key in keys[index])))
    target = max(1, round(share * len(rows)))
    chosen: list[list[int]] = []
    taken = 0
    for group in order:
        if taken + len(group) <= target:
            chosen.append(group)
            taken += len(group)
    if not chosen:
        chosen = [min(order, key=len)]
    note = ""
    if len(chosen) == len(groups):
        chosen = chosen[:-1]
        if not chosen:
            note = (
                f"all {len(rows)} samples show the same pictures, so none is held out"
                if len(rows) > 1
                else ("one sample cannot be split, so none is held out")
            )
    held = {index for group in chosen for index in group}
    if not note and abs(len(held) - target) > max(1, 0.2 * target):
        note = f"{len(held)} samples are held out instead of {target}: samples with a common picture stay together"
    return Split(
        kind="share",
        train=tuple(sorted(row for index, row in enumerate(rows) if index not in held)),
        eval=tuple(sorted(rows[index] for index in held)),
        share=share,
        seed=seed,
        note=note,
    )


def _groups(keys: Sequence[Sequence[str]], count: int) -> list[list[int]]:
    """Indices below `count` that are connected through common keys; `keys[i]` belongs to index i modulo `count`."""
    parent = list(range(count))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[str, int] = {}
    for index, own in enumerate(keys):
        for key in own:
            parent[root(index % count)] = root(first.setdefault(key, index % count))
    groups: dict[int, list[int]] = {}
    for index in range(count):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())
