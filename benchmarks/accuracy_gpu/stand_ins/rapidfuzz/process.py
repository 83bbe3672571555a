"""The nearest of several texts, by difflib."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rapidfuzz import fuzz

Found = tuple[str, float, int]


def extract(
    query: str,
    choices: Iterable[str],
    scorer: Callable[..., float] = fuzz.ratio,
    limit: int = 5,
    score_cutoff: float = 0,
    **_: object,
) -> list[Found]:
    """(choice, score, place) of the nearest, best first."""
    found = [(choice, scorer(query, choice), place) for place, choice in enumerate(choices)]
    return sorted((row for row in found if row[1] >= score_cutoff), key=lambda row: -row[1])[:limit]


def extractOne(query: str, choices: Iterable[str], **how: object) -> Found | None:  # noqa: N802  (upstream's name)
    return next(iter(extract(query, choices, limit=1, **how)), None)  # type: ignore[arg-type]
