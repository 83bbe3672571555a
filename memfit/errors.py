"""The exception tree. Every class carries the exit code that the command line ends with."""

from __future__ import annotations

from collections.abc import Sequence


class MemfitError(Exception):
    """Base of all errors that memfit raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class UserError(MemfitError):
    """Something the user can mend: `problem` is one line with the numbers, `hint` the smallest change that works.

    >>> print(UserError("recipe.yaml: unknown key 'modle'", "did you mean 'model'?"))
    recipe.yaml: unknown key 'modle'
    <BLANKLINE>
    hint: did you mean 'model'?
    """

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(f"{problem}\n\nhint: {hint}")
        self.problem = problem
        self.hint = hint


class DoesNotFit(MemfitError):
    """No allowed set-up fits the hardware. `refusals` are one-line reasons, each with its bytes."""

    exit_code = 3

    def __init__(self, problem: str, hint: str, refusals: Sequence[str] = ()) -> None:
        super().__init__(f"{problem}\n\nhint: {hint}")
        self.problem = problem
        self.hint = hint
        self.refusals = tuple(refusals)


class ProofFailed(MemfitError):
    """Something asked for is not in effect, or takes more than forecast: the run does not start."""

    exit_code = 4

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(f"{problem}\n\nhint: {hint}")
        self.problem = problem
        self.hint = hint


class RunFailed(MemfitError):
    """A started run broke. What it had saved stays; the message says where."""

    exit_code = 5

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(f"{problem}\n\nhint: {hint}")
        self.problem = problem
        self.hint = hint
