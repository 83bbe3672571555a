"""Mistakes are collected and told all at once."""

from __future__ import annotations

from collections.abc import Sequence

from memfit.errors import UserError

# (the problem in one line with its numbers, the smallest change that works)
Problem = tuple[str, str]


def as_error(problems: Sequence[Problem]) -> UserError:
    """One error of all problems, each with its own change."""
    if len(problems) == 1:
        return UserError(*problems[0])
    lines = "".join(f"\n  {problem} ({hint})" for problem, hint in problems)
    return UserError(f"{len(problems)} settings do not go together{lines}", f"mend all {len(problems)}")


def listed(names: Sequence[str], word: str = "or") -> str:
    """`a, b or c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
