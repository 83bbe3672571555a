"""What memfit forecasts for a cell, in the groups that are measured: bytes of one rank."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy_cpu.grid import Cell
from benchmarks.accuracy_cpu.runs import prepared_of, rows_of, samples_of
from memfit.errors import UserError
from memfit.planner.activations import device_bytes, peak_of
from memfit.planner.interval import interval_of
from memfit.specs.ledger import Term
from memfit.specs.plan import Forecast
from memfit.specs.trace import TRACED_PHASES
from memfit.trace.forecast import forecast_plan

STATES = ("weights", "master", "optimizer", "paged", "gradients")


@dataclass(frozen=True)
class Predicted:
    """Bytes of one rank by group, None where memfit gives no figure; `refused` says why it gives none at all.

    `states` maps the kinds of STATES to bytes. `phases`: the peak of each traced phase.
    """

    states: dict[str, int] | None
    saved: int | None
    transient: int | None
    buffers: int | None
    total: int | None
    phases: dict[str, int] | None = None
    interval: tuple[int, int] | None = None
    missing: tuple[str, ...] = ()
    refused: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def predict(cell: Cell, work: Path) -> Predicted:
    """Ask memfit for the forecast of exactly this cell's batch."""
    try:
        prepared = prepared_of(cell, work)
        rows = rows_of(prepared, samples_of(cell, work))
        forecast = forecast_plan(prepared, rows).forecast
    except UserError as error:
        return refusal(error.problem)
    return _read(forecast)


def refusal(reason: str) -> Predicted:
    """No forecast, and why."""
    return Predicted(None, None, None, None, None, refused=reason)


def _read(forecast: Forecast) -> Predicted:
    ledger, ranks = forecast.ledger, forecast.hardware.ranks
    states = {kind: size // ranks for kind, size in _states(forecast).items()}
    trace, peak = forecast.trace, peak_of(forecast)
    if trace is None or peak is None:
        reason = f"memfit does not forecast {', '.join(ledger.missing[:3])} here"
        return Predicted(states, None, None, None, None, missing=ledger.missing, refused=reason)
    sizes = device_bytes(forecast)
    alone = forecast.recipe.levers.parallel == "none"
    return Predicted(
        states=states,
        saved=trace.saved_bytes,
        transient=max(row.transient for row in trace.parts) if alone else _beside(forecast, peak) // ranks,
        buffers=_buffers(forecast, peak[0]) // ranks,
        total=peak[1] // ranks,
        phases={phase: sizes[phase] // ranks for phase in (*TRACED_PHASES, "step")},
        interval=_interval(forecast, peak[0]),
        missing=ledger.missing,
    )


def _interval(forecast: Forecast, phase: str) -> tuple[int, int]:
    """The 90% interval of one rank's peak: by the terms alive then, what the process itself takes left out."""
    alive = [term for term in forecast.ledger.at("host") if phase in term.alive and not term.id.startswith("host.")]
    found, ranks = interval_of(alive, here=True), forecast.hardware.ranks
    return found.low_bytes // ranks, found.high_bytes // ranks


def _states(forecast: Forecast) -> dict[str, int]:
    """Bytes of each kind of state on all ranks; gradients are those that the optimizer's step finds."""
    found = dict.fromkeys(STATES, 0)
    for term in forecast.ledger.at("host"):
        kind = _state(term)
        if kind and (kind != "gradients" or "step" in term.alive):
            found[kind] += term.bytes
        elif forecast.recipe.levers.parallel == "zero1" and "gradient_copies" in term.id and "step" in term.alive:
            found["gradients"] += term.bytes  # the own share; whole ones go when backward has ended
    return found


def _state(term: Term) -> str | None:
    """The kind of state that a term is; "gradients.so_far" is the trace's share of them at one moment."""
    if term.id.startswith("gradients.so_far"):
        return None
    return next((kind for kind in STATES if kind in term.id.split(".")[:2]), None)


def _beside(forecast: Forecast, peak: tuple[str, int]) -> int:
    """What the peak holds beside states, saved tensors and buffers; gradients on their way are in it."""
    phase, total = peak
    alive = [term for term in forecast.ledger.at("host") if phase in term.alive and not term.id.startswith("host.")]
    states = sum(term.bytes for term in alive if _state(term) not in (None, "gradients"))
    saved = sum(term.bytes for term in alive if term.id == f"activations.{phase}")
    return total - states - saved - _buffers(forecast, phase)


def _buffers(forecast: Forecast, phase: str) -> int:
    """What lies beside the states in a phase: the batch, the model's buffers, and those that the engine keeps."""
    parallel = forecast.recipe.levers.parallel
    found = 0
    for term in forecast.ledger.at("host"):
        first, _, rest = term.id.partition(".")
        stays = first == parallel and set(TRACED_PHASES) <= set(term.alive) and not _state(term)
        bucket = rest.startswith("reduce_bucket") or (parallel == "ddp" and "gradient_copies" in term.id)
        if phase in term.alive and (stays or bucket or first in ("batch", "buffers")):
            found += term.bytes
    return found
