"""A proof: what was asked for and what live objects showed, before the long run. `proof.json` holds one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from memfit.specs.ledger import Place

ProofKind = Literal["full", "quick"]


@dataclass(frozen=True)
class Check:
    """One lever: what the plan asked, what was read back, and whether they agree.

    `lever` is the recipe's key (levers.parallel, parts.vision, image.max_slices) or names what no key says (labels,
    learning rates of parts). `asked` and `found` are short texts that a person compares. `ok` is None where nothing
    could be read, and `evidence` says why; else `evidence` says which object was read, on which rank, and what stood
    there. `fix` is the smallest change that works, "" where there is nothing to mend.
    """

    lever: str
    asked: str
    found: str
    ok: bool | None
    evidence: str
    fix: str = ""


@dataclass(frozen=True)
class Compared:
    """Forecast and measured bytes of one group of terms in one phase on one rank, joined by term id.

    `ids` are the ledger's terms; none: bytes that the ledger does not name. Exactly one row of a phase and rank has the
    name `unexplained`: what is measured and neither named nor attributed.
    """

    name: str
    ids: tuple[str, ...]
    phase: str
    rank: int
    place: Place
    forecast_bytes: int
    measured_bytes: int


@dataclass(frozen=True)
class Alive:
    """One tensor alive at the measured peak. `module` is where it was made, `line` the source line, `term` its id.

    `term` is "" where the ledger names nothing like it: a finding.
    """

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    module: str
    line: str
    term: str


@dataclass(frozen=True)
class WorstBatch:
    """One micro-batch of the user's data that was run: why it was taken, which samples, how large."""

    reason: str
    samples: tuple[str, ...]
    tokens: int
    trained_tokens: int
    images: int
    crops: int


@dataclass(frozen=True)
class Proof:
    """What was proved of one plan. `failed` names the levers that are not in effect; empty: the run may start.

    `peak_forecast_bytes`, `high_bytes`: the forecast of the binding rank and the upper end of its interval;
    `peak_measured_bytes` the measured one. `text`: one sample as it is trained, decoded, loss-carrying tokens marked.
    """

    kind: ProofKind
    hardware: str
    checks: tuple[Check, ...]
    batches: tuple[WorstBatch, ...]
    compared: tuple[Compared, ...]
    alive: tuple[Alive, ...]
    peak_forecast_bytes: int | None
    peak_measured_bytes: int | None
    high_bytes: int | None
    step_seconds: float | None
    forecast_step_seconds: float | None
    run_seconds: float | None
    seconds: float
    text: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.ok is False)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the names of the failed levers beside them."""
        return {**asdict(self), "failed": [check.lever for check in self.failed]}
