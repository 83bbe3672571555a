"""Lay a traced step over a forecast of states: what batch, activations and temporaries add, phase by phase.

A phase's peak is one moment. At that moment the trace says what the batch, autograd's saved tensors, everything else
and the gradients made so far take; the states alive in the phase come from the forecast. Their sum is the peak.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from memfit.physics.engine import peak_places
from memfit.planner.engine_stages import Stages
from memfit.planner.estimate import states_place
from memfit.planner.host_terms import PROCESS_PART, host_terms, node_figures
from memfit.planner.interval import interval_of
from memfit.planner.verdict import with_verdict
from memfit.specs.ledger import PHASES, Ledger, Place, Term
from memfit.specs.plan import Forecast, Interval, Reserved, Speed
from memfit.specs.trace import TRACED_PHASES, PeakRow, StepTrace
from memfit.specs.workload import LoaderLoad

# What a trace answers, in the words of `Ledger.missing`.
ANSWERED = (
    "activations",
    "logits and loss",
    "temporaries of forward and backward",
    "4-bit weights unpacked for a moment",
)
# Parts of a peak -> (name of the term, what it is). The first four are a trace's own, the others an engine's; "{}" is
# the engine's name.
PIECES = {
    "inputs": ("batch", "the batch on the device"),
    "saved": ("activations", "what autograd keeps for backward"),
    "transient": ("transient", "everything else that is alive: logits, temporaries, gradients of activations"),
    "gradients": ("gradients.so_far", "gradients of parameters made so far"),
    "gathered": ("{}.gathered", "parameters that are whole around their use"),
    "bucket": ("{}.reduce_bucket", "reduce buckets"),
    "copy": ("{}.reduce_copy", "copy of the bucket that is reduced"),
    "waiting": ("{}.waiting_gradients", "whole gradients that are not reduced yet"),
    "norm": ("{}.norm_copy", "a gradient in the dtype that norms are taken in"),
    "scatter": ("{}.scatter_input", "input of the last reduction"),
    "output": ("{}.scatter_output", "output of a reduction that is added to what is there"),
    "partition": ("{}.gradient_partition", "the own share of the gradients"),
}


@dataclass(frozen=True)
class Peak:
    """One moment: bytes by the keys of PIECES, the phase, and where it is."""

    phase: str
    pieces: Mapping[str, int]
    where: str


def with_trace(
    forecast: Forecast,
    trace: StepTrace,
    reserved: Reserved | None = None,
    stages: Stages | None = None,
    load: LoaderLoad | None = None,
) -> Forecast:
    """The forecast with the terms of a traced micro-batch, its peaks, and the verdict that follows.

    `reserved` is what the allocator's replay of the same step gave; None on CPU ranks, which have no such allocator.
    `stages` is what the engine does meanwhile; without it the trace's own peaks stand and evaluation stays unknown.
    `load` is what the data make of the loader; without it the traced batch stands in.
    """
    ranks = 1 if states_place(forecast.hardware) == "gpu" else forecast.hardware.gpus_per_node
    kept = [_outside_traced_phases(term) for term in forecast.ledger.terms]
    peaks = peaks_of(stages) if stages else tuple(_traced_peak(row) for row in trace.peaks)
    terms = [*kept, *_peak_terms(forecast, trace, peaks, ranks)]
    missing = tuple(words for words in forecast.ledger.missing if words not in ANSWERED)
    if reserved is not None:
        reserved, more = _reserved_terms(reserved, Ledger(tuple(terms)))
        terms += more
        missing = tuple(words for words in missing if not words.startswith(("allocator", "CUDA context", "NCCL")))
    node = None
    if stages is None:
        missing = (*missing, "evaluation and saving beyond states")
    else:
        terms += host_terms(stages.counting, trace, load)
        node = node_figures(stages.counting, Ledger(tuple(terms)))
    ledger = Ledger(tuple(terms), missing)
    traced = dataclasses.replace(forecast, ledger=ledger, trace=trace, reserved=reserved, node=node)
    return with_verdict(dataclasses.replace(traced, interval=_interval(traced)))


def with_speed(forecast: Forecast, speed: Speed | None) -> Forecast:
    """The forecast with its speed; None where work or rates are not known, which stays among what is missing."""
    if speed is None:
        return forecast
    missing = tuple(words for words in forecast.ledger.missing if words != "speed")
    return dataclasses.replace(forecast, speed=speed, ledger=Ledger(forecast.ledger.terms, missing))


def peaks_of(stages: Stages) -> tuple[Peak, ...]:
    """The moment of each phase with the most bytes, states excepted; evaluation is forward and loss without a graph."""
    pieces, rows = stages.pieces, stages.stretches
    totals = [row.activations + sum(pieces[name][at] for name in pieces) for at, row in enumerate(rows)]
    places = peak_places([row.phase for row in rows], totals)
    peaks = []
    for phase, at in ((phase, int(place)) for phase, place in places.items()):
        row = rows[at]
        found = {"inputs": row.inputs, "saved": row.saved, "transient": row.transient}
        found |= {"gradients" if name == "kept" else name: sizes[at] for name, sizes in pieces.items()}
        peaks.append(Peak(phase, found, row.module or "no module"))
    return (*peaks, _evaluation(stages))


def _evaluation(stages: Stages) -> Peak:
    """Without a graph a block keeps what it made itself until it is left, and nothing of the blocks before it."""
    pieces = stages.pieces["gathered"]
    best, found = -1, Peak("evaluate", {}, "")
    for at, row in enumerate(stages.stretches):
        if row.phase != "backward" and row.inputs + row.transient + row.recent + pieces[at] > best:
            best = row.inputs + row.transient + row.recent + pieces[at]
            sizes = {"inputs": row.inputs, "transient": row.transient + row.recent, "gathered": pieces[at]}
            found = Peak("evaluate", sizes, row.module or "no module")
    return found


def _traced_peak(row: PeakRow) -> Peak:
    block = "" if row.block is None else f" block {row.block}"
    sizes = {name: getattr(row, name) for name in ("inputs", "saved", "transient", "gradients")}
    return Peak(row.phase, sizes, f"{row.part}{block}, {row.op}")


def known_phases(forecast: Forecast) -> tuple[str, ...]:
    """The phases whose bytes are forecast: none without a trace."""
    if forecast.trace is None:
        return ()
    return PHASES if forecast.trace.stretches else ("load", *TRACED_PHASES, "step")


def device_bytes(forecast: Forecast) -> dict[str, int]:
    """Bytes of each phase where the states are; on CPU ranks without what the processes take for themselves."""
    terms = [term for term in forecast.ledger.at(states_place(forecast.hardware)) if term.part != PROCESS_PART]
    return {phase: sum(term.bytes for term in terms if phase in term.alive) for phase in PHASES}


def peak_of(forecast: Forecast) -> tuple[str, int] | None:
    """The phase with the highest peak and its bytes where the states are; None without a trace."""
    if forecast.trace is None:
        return None
    sizes = device_bytes(forecast)
    known = {phase: sizes[phase] for phase in known_phases(forecast)}
    phase = max(known, key=lambda name: known[name])
    return phase, known[phase]


def _outside_traced_phases(term: Term) -> Term:
    """Gradients come alive one by one while backward runs: in the traced phases the peaks count them."""
    kinds = {"gradients", "gradient_copies"} & set(term.id.split(".")[:2])
    if not kinds or term.alive == PHASES or term.place == "disk":
        return term
    return dataclasses.replace(term, alive=tuple(phase for phase in term.alive if phase not in TRACED_PHASES))


def _peak_terms(forecast: Forecast, trace: StepTrace, peaks: Iterable[Peak], ranks: int) -> Iterator[Term]:
    place: Place = "gpu" if forecast.hardware.gpu else "host"
    stand_ins = f", with {', '.join(trace.substitutions)}" if trace.substitutions else ""
    traced = f"trace of one micro-batch as on a {trace.device}{stand_ins}"
    layout = forecast.layout
    for peak in peaks:
        for piece, (template, words) in PIECES.items():
            size = peak.pieces.get(piece, 0)
            if not size:
                continue
            name = template.format(layout.name if layout else "")
            formula = f"{size:,} B at the {peak.phase} peak, in {peak.where}"
            yield Term(
                id=f"{name}.{peak.phase}",
                name=f"{words}, at the peak of {peak.phase}",
                part="batch" if piece == "inputs" else "activations",
                place=place,
                alive=(peak.phase,),
                bytes=size * ranks,
                source=f"{layout.source}; {traced}" if layout and "{}" in template else traced,
                formula=formula + (f" x {ranks} ranks" if ranks > 1 else ""),
            )


def _reserved_terms(reserved: Reserved, ledger: Ledger) -> tuple[Reserved, list[Term]]:
    """What the allocator adds to the largest phase. Reserved is never less than what the ledger says is allocated."""
    rounding = Term(
        id="rounding",
        name="blocks above the tensors in them",
        part="allocator",
        place="gpu",
        alive=PHASES,
        bytes=reserved.peak_allocated - reserved.requested,
        source=reserved.source,
        formula=f"{reserved.peak_allocated:,} B in blocks - {reserved.requested:,} B asked for, at their peaks",
    )
    allocated = max(ledger.phase_bytes().values()) + rounding.bytes
    reserved = dataclasses.replace(reserved, peak_reserved=max(reserved.peak_reserved, allocated))
    cached = Term(
        id="allocator.cached",
        name="reserved above allocated: free blocks and what is left of segments",
        part="allocator",
        place="allocator",
        alive=PHASES,
        bytes=reserved.peak_reserved - allocated,
        source=reserved.source,
        formula=f"{reserved.peak_reserved:,} B reserved - {allocated:,} B allocated at their peaks",
    )
    outside = []
    for name, size, source in reserved.outside:
        place: Place = "comm" if name.startswith("comm.") else "context"
        outside.append(
            Term(name, name.replace(".", " "), "process", place, PHASES, size, source, f"{size:,} B a process")
        )
    return reserved, [rounding, cached, *outside]


def _interval(forecast: Forecast) -> Interval | None:
    """Of the process on a GPU; on CPU ranks of the peak of states and activations. None where that is not known."""
    peak, place = peak_of(forecast), states_place(forecast.hardware)
    if peak is None or not forecast.trace or not forecast.trace.stretches:
        return None
    if forecast.hardware.gpu and forecast.reserved is None:
        return None
    places = {place, "allocator", "context", "comm"} if forecast.hardware.gpu else {place}
    alive = [term for term in forecast.ledger.terms if term.place in places and peak[0] in term.alive]
    return interval_of([term for term in alive if term.part != PROCESS_PART], here=forecast.hardware.gpu is None)


def phase_table(forecast: Forecast) -> Mapping[str, int | None]:
    """Bytes of each phase where the states are; None for phases that are not forecast."""
    sizes = device_bytes(forecast)
    known = known_phases(forecast)
    return {phase: sizes[phase] if phase in known else None for phase in sizes}
