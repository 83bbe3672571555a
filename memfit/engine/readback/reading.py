"""What one rank reads of one lever, and how the readings of all ranks become one check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import distributed

from memfit.engine.ranks import count
from memfit.errors import UserError
from memfit.specs.proof import Check


@dataclass(frozen=True)
class Reading:
    """One lever on this rank. `asked` is None where nothing was asked: then what is found is stated, not judged.

    `same`: all ranks must find the same; false for figures that differ by right (bytes of a share, tokens of a batch).
    """

    lever: str
    asked: str | None
    found: str
    ok: bool | None
    evidence: str
    fix: str = ""
    same: bool = True


def compared(lever: str, asked: str | None, found: str, evidence: str, fix: str = "") -> Reading:
    """A reading that is right where both texts are equal."""
    return Reading(lever, asked, found, None if asked is None else asked == found, evidence, fix)


def stated(lever: str, found: str, evidence: str, asked: str | None = None) -> Reading:
    """A reading that is told and not judged; `evidence` says why."""
    return Reading(lever, asked, found, None, evidence, same=False)


def unreadable(name: str, error: Exception) -> Reading:
    """What is told of a reader that met objects it does not know: a finding, never a pass."""
    first = next(iter(str(error).strip().splitlines()), "")
    return Reading(
        f"reading {name}", "readable", "not readable", False, f"{type(error).__name__}: {first}"[:300], same=False
    )


def tried(readers: Iterable[tuple[str, Callable[[], Iterable[Reading]]]]) -> list[Reading]:
    """All readings; a reader that fails becomes a finding of its own, so that the other ranks do not wait for ever."""
    found: list[Reading] = []
    for name, reader in readers:
        try:
            found += list(reader())
        except UserError as error:
            if count() == 1:
                raise  # a picture that changed meanwhile, say: the user's to mend, and no other rank waits
            found.append(unreadable(name, error))
        except Exception as error:  # whatever an engine's objects do: it is told
            found.append(unreadable(name, error))
    return found


def across_ranks(own: Sequence[Reading]) -> tuple[Check, ...]:
    """One check a lever from what every rank read. Every rank must call it, and all get the same."""
    ranks: list[list[Reading]] = [list(own)]
    if count() > 1:
        gathered: list[list[Reading] | None] = [None] * count()
        distributed.all_gather_object(gathered, list(own))
        ranks = [list(each or []) for each in gathered]
    return tuple(joined(ranks))


def joined(ranks: Sequence[Sequence[Reading]]) -> Iterator[Check]:
    """The checks of all levers in the order in which the ranks read them."""
    by_rank = [dict(_numbered(readings)) for readings in ranks]
    for key in dict.fromkeys(key for readings in by_rank for key in readings):
        yield _one([readings.get(key) for readings in by_rank])


def _numbered(readings: Sequence[Reading]) -> Iterator[tuple[tuple[str, int], Reading]]:
    seen: dict[str, int] = {}
    for reading in readings:
        number = seen[reading.lever] = seen.get(reading.lever, 0) + 1
        yield (reading.lever, number), reading


def _one(found: Sequence[Reading | None]) -> Check:
    present = [reading for reading in found if reading is not None]
    first, several = present[0], len(found) > 1
    asked = first.asked if first.asked is not None else ""
    silent = [rank for rank, reading in enumerate(found) if reading is None]
    wrong = [(rank, reading) for rank, reading in enumerate(found) if reading is not None and reading.ok is False]
    if silent:
        where = f"only on rank {', '.join(str(r) for r, reading in enumerate(found) if reading is not None)}"
        return Check(first.lever, asked, first.found, False, f"{where}: {first.evidence}", first.fix)
    if wrong:
        reading = wrong[0][1]
        who = "" if not several else "every rank: " if len(wrong) == len(found) else f"rank {_listed(wrong)} only: "
        asked = reading.asked if reading.asked is not None else ""
        return Check(reading.lever, asked, reading.found, False, who + reading.evidence, reading.fix)
    if first.same and len({reading.found for reading in present}) > 1:
        texts = "; ".join(f"rank {rank}: {reading.found}" for rank, reading in enumerate(present))
        fix = first.fix or "give every rank the same code, files and environment"
        return Check(first.lever, asked, texts, False, f"the ranks differ: {first.evidence}", fix)
    ok = None if any(reading.ok is None for reading in present) else True
    who = f"all {len(found)} ranks: " if several and first.same else "rank 0: " if several else ""
    return Check(first.lever, asked, first.found, ok, who + first.evidence, "" if ok else first.fix)


def _listed(wrong: Sequence[tuple[int, Reading]]) -> str:
    return ", ".join(str(rank) for rank, _ in wrong)
