"""What `train` did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memfit.units import duration


@dataclass(frozen=True)
class TrainResult:
    """What `train` did. `projected_seconds` stands after a pilot, which saves no model (`model` is None)."""

    folder: Path
    model: Path | None
    steps: int
    total_steps: int
    seconds: float
    loss: float | None
    projected_seconds: float | None

    def text(self, whole_command: str) -> str:
        """What a person reads after training; after a pilot, how long the whole run takes and how to start it."""
        if self.projected_seconds is not None:
            return (
                f"pilot: {self.steps} of {self.total_steps} steps in {duration(self.seconds)}; the whole run would "
                f"take about {duration(self.projected_seconds)}\nstart it with: {whole_command}"
            )
        loss = "-" if self.loss is None else f"{self.loss:.4f}"
        return (
            f"trained {self.steps} steps in {duration(self.seconds)}, last loss {loss}\nmodel: {self.model}\n"
            f"next: memfit eval {self.folder} --base, then memfit report {self.folder}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, paths as texts."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}
