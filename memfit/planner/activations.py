"""Lay a traced step over a forecast of states: what batch, activations and temporaries add, phase by phase.

A phase's peak is one moment. At that moment the trace says what the batch, autograd's saved tensors, everything else
and the gradients made so far take; the states alive in the phase come from the forecast. Their sum is the peak.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from memfit.planner.estimate import capacity_bytes, states_place
from memfit.specs.ledger import Ledger, Place, Term
from memfit.specs.plan import Forecast, Reserved
from memfit.specs.trace import TRACED_PHASES, PeakRow, StepTrace

# What a trace answers, in the words of `Ledger.missing`.
ANSWERED = ("activations", "logits and loss", "temporaries of forward and backward")
# Parts of a traced peak: field of PeakRow -> (name of the term, what it is).
PIECES = {
    "inputs": ("batch", "the batch on the device"),
    "saved": ("activations", "what autograd keeps for backward"),
    "transient": ("transient", "everything else that is alive: logits, temporaries, gradients of activations"),
    "gradients": ("gradients.so_far", "gradients of parameters made so far"),
}


def with_trace(forecast: Forecast, trace: StepTrace, reserved: Reserved | None = None) -> Forecast:
    """The forecast with the terms of a traced micro-batch, its peaks, and the verdict that follows.

    `reserved` is what the allocator's replay of the same step gave; None on CPU ranks, which have no such allocator.
    """
    ranks = 1 if states_place(forecast.hardware) == "gpu" else forecast.hardware.gpus_per_node
    kept = [_outside_traced_phases(term) for term in forecast.ledger.terms]
    terms = [*kept, *_trace_terms(forecast, trace, ranks)]
    missing = tuple(words for words in forecast.ledger.missing if words not in ANSWERED)
    if reserved is not None:
        terms += _reserved_terms(reserved)
        missing = tuple(words for words in missing if not words.startswith(("allocator", "CUDA context")))
    missing = (*missing, "evaluation and saving beyond states")
    traced = dataclasses.replace(forecast, ledger=Ledger(tuple(terms), missing), trace=trace, reserved=reserved)
    return _with_verdict(traced)


def peak_of(forecast: Forecast) -> tuple[str, int] | None:
    """The phase with the highest peak and its bytes where the states are; None without a trace."""
    if forecast.trace is None:
        return None
    sizes = forecast.ledger.phase_bytes(states_place(forecast.hardware))
    known = {phase: sizes[phase] for phase in ("load", *TRACED_PHASES, "step")}
    phase = max(known, key=lambda name: known[name])
    return phase, known[phase]


def process_bytes(forecast: Forecast) -> int | None:
    """What the GPU's process takes: the allocator's segments and what lies outside them. None without a replay."""
    if forecast.reserved is None:
        return None
    outside = sum(term.bytes for term in forecast.ledger.terms if term.place in {"context", "comm"})
    return forecast.reserved.peak_reserved + outside


def _outside_traced_phases(term: Term) -> Term:
    """Gradients come alive one by one while backward runs: in the traced phases the trace counts them."""
    if term.id.split(".")[0] != "gradients" and ".gradients" not in term.id:
        return term
    return dataclasses.replace(term, alive=tuple(phase for phase in term.alive if phase not in TRACED_PHASES))


def _trace_terms(forecast: Forecast, trace: StepTrace, ranks: int) -> Iterable[Term]:
    place: Place = "gpu" if forecast.hardware.gpu else "host"
    stand_ins = f", with {', '.join(trace.substitutions)}" if trace.substitutions else ""
    source = f"trace of one micro-batch as on a {trace.device}{stand_ins}"
    for row in trace.peaks:
        where = _where(row)
        for field, (name, words) in PIECES.items():
            size = getattr(row, field)
            if size:
                formula = f"{size:,} B at the {row.phase} peak, in {where}" + (f" x {ranks} ranks" if ranks > 1 else "")
                yield Term(
                    id=f"{name}.{row.phase}",
                    name=f"{words}, at the peak of {row.phase}",
                    part="batch" if field == "inputs" else "activations",
                    place=place,
                    alive=(row.phase,),
                    bytes=size * ranks,
                    source=source,
                    formula=formula,
                )


def _where(row: PeakRow) -> str:
    block = "" if row.block is None else f" block {row.block}"
    return f"{row.part}{block}, {row.op}"


def _reserved_terms(reserved: Reserved) -> Iterable[Term]:
    yield Term(
        id="rounding",
        name="blocks above the tensors in them",
        part="allocator",
        place="gpu",
        alive=("load", *TRACED_PHASES, "step"),
        bytes=reserved.peak_allocated - reserved.requested,
        source=reserved.source,
        formula=f"{reserved.peak_allocated:,} B in blocks - {reserved.requested:,} B asked for, at their peaks",
    )
    yield Term(
        id="allocator.cached",
        name="reserved above allocated: free blocks and what is left of segments",
        part="allocator",
        place="allocator",
        alive=("load", *TRACED_PHASES, "step"),
        bytes=reserved.peak_reserved - reserved.peak_allocated,
        source=reserved.source,
        formula=f"{reserved.peak_reserved:,} B reserved - {reserved.peak_allocated:,} B allocated at their peaks",
    )
    for name, size, source in reserved.outside:
        yield Term(name, name.replace(".", " "), "process", "context", ("load", *TRACED_PHASES, "step"), size, source)


def _with_verdict(forecast: Forecast) -> Forecast:
    capacity, process = capacity_bytes(forecast.hardware), process_bytes(forecast)
    if forecast.fits is False or capacity is None or process is None:
        return forecast
    fits = process <= capacity
    return dataclasses.replace(forecast, fits=fits, verdict="fits" if fits else "does-not-fit")


def phase_table(forecast: Forecast) -> Mapping[str, int | None]:
    """Bytes of each phase where the states are; None for phases that are not forecast."""
    sizes = forecast.ledger.phase_bytes(states_place(forecast.hardware))
    known = {"load", "step", *TRACED_PHASES} if forecast.trace is not None else set()
    return {phase: sizes[phase] if phase in known else None for phase in sizes}
