"""What `memfit eval` takes and gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memfit.specs.evaluation import Comparison, Evaluation


@dataclass(frozen=True)
class EvaluateRequest:
    """What to evaluate; the fields are those of `memfit eval --help`."""

    run_or_model: str
    data: Path | None = None
    base: bool = False
    images: str = "as-is"
    name: str | None = None
    limit: int | None = None
    out: Path | None = None
    sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluateResult:
    """The evaluations in the order they were made, base against tuned where both were asked for, and the files."""

    evaluations: tuple[Evaluation, ...]
    comparison: Comparison | None
    written: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "evaluations": [evaluation.to_json() for evaluation in self.evaluations],
            "comparison": self.comparison.to_json() if self.comparison else None,
            "written": [str(path) for path in self.written],
        }
