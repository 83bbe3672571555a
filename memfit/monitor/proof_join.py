"""What ranks measured beside what was forecast, joined by the ledger's term ids: rows, findings, and the proof."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memfit.planner.activations import device_bytes, known_phases
from memfit.planner.estimate import states_place
from memfit.planner.host_terms import PROCESS_PART
from memfit.planner.verdict import process_bytes
from memfit.specs.ledger import PHASES, Term
from memfit.specs.plan import Forecast, Plan
from memfit.specs.proof import Alive, Check, Compared, Proof, ProofKind, WorstBatch
from memfit.units import gib

Row = Mapping[str, Any]
UNEXPLAINED = "unexplained"
# Every block of the CPU allocator begins at a multiple of this (c10/core/alignment.h: gAlignment): what a scalar of the
# loop that the ledger does not name (the loss, a count of tokens) takes, whatever its size.
ALIGNMENT = 64
# Groups of the table, in its order, and the roles of measured storages that belong to each.
GROUPS = {
    "weights": ("weights",),
    "master weights": ("master",),
    "optimizer states": ("optimizer",),
    "gradients": ("gradients",),
    "buffers": ("buffers",),
    "batch": ("batch",),
    "kept for backward": ("saved",),
    "temporaries": ("transient",),
    "engine": ("engine", "gathered"),
    UNEXPLAINED: ("held",),
}
# Pieces of a term's id -> group; the first that is found counts, in this order.
_PIECES = {
    "master": "master weights",
    "optimizer": "optimizer states",
    "paged": "optimizer states",
    "gradients": "gradients",
    "gradient_copies": "gradients",
    "gradient_partition": "gradients",
    "weights": "weights",
    "quant": "weights",
    "buffers": "buffers",
    "batch": "batch",
    "activations": "kept for backward",
    "transient": "temporaries",
}


@dataclass(frozen=True)
class RunFacts:
    """What a proof is laid against beside its plan.

    `accumulation`: micro-batches of a step of the run; `micros`: of a step of the proof. `mean_share`: tokens of the
    mean sample as a share of the worst batch's. `free_disk`: bytes of the run folder's disk before the run.
    """

    kind: ProofKind
    batches: tuple[WorstBatch, ...]
    accumulation: int
    micros: int
    total_steps: int
    mean_share: float
    free_disk: int


def joined(plan: Plan, seen: Sequence[Row], facts: RunFacts, more: Sequence[Check], seconds: float) -> Proof:
    """The proof of a plan from what every rank saw, in the order of the ranks; `more`: checks made afterwards."""
    forecast = plan.forecast
    rows = tuple(row for rank in seen for row in compared_rows(forecast, rank))
    peak, high, expected = _peaks(forecast, seen)
    step = _step_seconds(seen, facts)
    speed = forecast.speed
    mended = [check for check in (_trouble(seen), _forecast_check(forecast, rows, (peak, high, expected))) if check]
    checks = (*_checks(seen), *more, *mended, *_disk(forecast, seen, facts))
    return Proof(
        kind=facts.kind,
        hardware=forecast.hardware.text,
        checks=checks,
        batches=facts.batches,
        compared=rows,
        alive=tuple(_alive(forecast, seen)),
        peak_forecast_bytes=expected,
        peak_measured_bytes=peak,
        high_bytes=high,
        step_seconds=step,
        forecast_step_seconds=speed.step_seconds if speed else None,
        run_seconds=None if step is None else step * facts.mean_share * facts.total_steps,
        seconds=round(seconds, 2),
        text=str(seen[0]["text"]) if seen else "",
        notes=tuple(_notes(forecast, seen)),
    )


def group_of(term_id: str) -> str:
    """The group of a term; an engine's own ones, and whatever is new, are "engine"."""
    pieces = term_id.split(".")
    return next((group for piece, group in _PIECES.items() if piece in pieces), "engine")


def compared_rows(forecast: Forecast, rank: Row) -> Iterator[Compared]:
    """Forecast and measured of one rank, group by group: the batch that was forecast, in every phase that was seen."""
    number, on_gpu = int(rank["rank"]), forecast.hardware.gpu is not None
    place: Any = states_place(forecast.hardware)
    ranks = 1 if on_gpu else forecast.hardware.gpus_per_node
    terms = [term for term in forecast.ledger.at(place) if term.part != PROCESS_PART]
    for phase, figures in _phases_of(rank, 0).items():
        alive = [term for term in terms if phase in term.alive]
        whole = int(rank["peaks"].get(phase, {}).get("allocated", figures["bytes"])) if on_gpu else figures["bytes"]
        yield from _rows(phase, (number, place, ranks), alive, figures["of"], whole)
    for phase, peak in rank["peaks"].items():
        reserved = sum(term.bytes for term in forecast.ledger.at("allocator") if phase in term.alive)
        ids = tuple(term.id for term in forecast.ledger.at("allocator"))
        yield Compared("allocator", ids, phase, number, "allocator", reserved, peak["reserved"] - peak["allocated"])
    process = [term for term in forecast.ledger.terms if term.part == PROCESS_PART and term.place == "host"]
    if number == 0 and rank["rss_bytes"]:
        alive = [term for term in process if "step" in term.alive]
        ids = tuple(term.id for term in alive)
        size = sum(term.bytes for term in alive) // forecast.hardware.gpus_per_node
        states = 0 if on_gpu else max(device_bytes(forecast).values()) // ranks
        yield Compared("process", ids, "step", number, "host", size + states, int(rank["rss_bytes"]))
    if number == 0 and rank["checkpoint_bytes"] is not None:
        disk = [term for term in forecast.ledger.at("disk") if term.id.startswith("disk.checkpoint.")]
        ids, size = tuple(term.id for term in disk), sum(term.bytes for term in disk)
        yield Compared("checkpoint", ids, "save", number, "disk", size, int(rank["checkpoint_bytes"]))


def _rows(
    phase: str, where: tuple[int, Any, int], alive: Sequence[Term], of: Mapping[str, int], whole: int
) -> Iterator[Compared]:
    number, place, ranks = where
    named = 0
    if place == "host" and not any(group_of(term.id) == "batch" for term in alive):
        # The loop holds the step's micro-batches until the next one: `host.waiting_batches`, a term of the process.
        whole -= sum(size for name, size in of.items() if name.split(".")[0] == "batch")
        of = {name: size for name, size in of.items() if name.split(".")[0] != "batch"}
    for group, roles in GROUPS.items():
        if group == UNEXPLAINED:
            continue
        mine = [term for term in alive if group_of(term.id) == group]
        measured = sum(size for name, size in of.items() if name.split(".")[0] in roles)
        named += measured
        if mine or measured:
            size = sum(term.bytes for term in mine) // ranks
            yield Compared(group, tuple(term.id for term in mine), phase, number, place, size, measured)
    yield Compared(UNEXPLAINED, (), phase, number, place, 0, whole - named)


def _phases_of(rank: Row, batch: int) -> dict[str, Row]:
    """What was tracked of one batch: phase -> figures."""
    found: dict[str, Row] = {}
    for course in rank["courses"]:
        if course["batch"] == batch:
            found |= {phase: figures for phase, figures in course["phases"].items() if phase in PHASES}
    return {phase: found[phase] for phase in PHASES if phase in found}


def _peaks(forecast: Forecast, seen: Sequence[Row]) -> tuple[int | None, int | None, int | None]:
    """Measured, the interval's upper end and forecast, of the rank with the most."""
    interval = forecast.interval
    if forecast.hardware.gpu is not None:
        held = [rank["process_bytes"] for rank in seen if rank["process_bytes"]]
        outside = sum(term.bytes for term in forecast.ledger.terms if term.place in ("context", "comm"))
        reserved = [peak["reserved"] + outside for rank in seen for peak in rank["peaks"].values()]
        measured = max(held or reserved, default=None)
        return measured, interval.high_bytes if interval else None, process_bytes(forecast)
    ranks = forecast.hardware.gpus_per_node
    sizes = [f["bytes"] for rank in seen for course in rank["courses"] for f in course["phases"].values()]
    known = known_phases(forecast)
    expected = max((size for phase, size in device_bytes(forecast).items() if phase in known), default=None)
    return (
        max(sizes, default=None),
        interval.high_bytes // ranks if interval else None,
        None if expected is None else expected // ranks,
    )


def _forecast_check(
    forecast: Forecast, rows: Sequence[Compared], peaks: tuple[int | None, int | None, int | None]
) -> Check | None:
    measured, high, expected = peaks
    if measured is None or high is None or expected is None:
        return None
    over = measured - high - _slack(rows, forecast)
    shown = f"{gib(measured)} at the highest moment"
    if over <= 0:
        return Check("forecast", f"at most {gib(high)}", shown, True, _evidence(forecast))
    place = states_place(forecast.hardware)
    inside = [row for row in rows if row.place == place and row.name != "process"]
    sums: dict[tuple[str, int], int] = {}
    for row in inside:
        sums[(row.phase, row.rank)] = sums.get((row.phase, row.rank), 0) + row.measured_bytes
    highest = max(sums, key=lambda key: sums[key])
    worst = max(
        (row for row in inside if (row.phase, row.rank) == highest),
        key=lambda row: row.measured_bytes - row.forecast_bytes,
    )
    by = worst.measured_bytes - worst.forecast_bytes
    ids = f" ({', '.join(worst.ids[:3])})" if worst.ids else ", which the ledger does not name"
    evidence = (
        f"{worst.name}{ids} in {worst.phase} on rank {worst.rank}: {gib(worst.measured_bytes)} measured, "
        f"{gib(worst.forecast_bytes)} forecast, {gib(by)} more"
    )
    fix = "look at the largest tensors below; levers.checkpointing: full or a smaller image budget makes room"
    return Check("forecast", f"at most {gib(high)}", shown, False, evidence, fix)


def _slack(rows: Sequence[Compared], forecast: Forecast) -> int:
    """What alignment may add on CPU ranks, where the interval is a few bytes wide; 0 on GPUs."""
    return 0 if forecast.hardware.gpu is not None else ALIGNMENT * len(rows)


def _evidence(forecast: Forecast) -> str:
    if forecast.hardware.gpu is not None:
        return "what the driver shows of the process, and torch.cuda.max_memory_allocated by phase"
    return "all live tensors of every rank, followed through whole steps"


def _trouble(seen: Sequence[Row]) -> Check | None:
    for rank in seen:
        if rank["trouble"]:
            return Check(
                "worst batch", "two steps run", rank["trouble"], False, f"rank {rank['rank']}", rank["hint"] or "-"
            )
    return None


def _checks(seen: Sequence[Row]) -> list[Check]:
    """What was read back: every rank has the same list, gathered from all."""
    return [Check(**check) for check in (seen[0]["checks"] if seen else ())]


def _disk(forecast: Forecast, seen: Sequence[Row], facts: RunFacts) -> Iterator[Check]:
    size = seen[0]["checkpoint_bytes"] if seen else None
    if size is None:
        return
    keep = forecast.recipe.run.keep
    needed = (keep + 1) * size
    yield Check(
        "run.keep",
        f"{keep} checkpoints and one being written: {gib(needed)}",
        f"{gib(facts.free_disk)} free",
        facts.free_disk >= needed,
        f"a checkpoint was written: {gib(size)}",
        "" if facts.free_disk >= needed else "set run.folder to another disk, or run.keep lower",
    )


def _step_seconds(seen: Sequence[Row], facts: RunFacts) -> float | None:
    """Seconds of one optimizer step of worst micro-batches on the slowest rank."""
    found = []
    for rank in seen:
        micro, step, whole = (rank["seconds"].get(name) or [] for name in ("micro", "step", "whole"))
        if micro and step:
            # One pair a micro-batch; the optimizer's step ends the last of them.
            found.append(statistics.median(micro) * facts.accumulation + step[-1])
        elif whole:
            found.append(whole[-1] * facts.accumulation / facts.micros)
    return max(found, default=None)


def _alive(forecast: Forecast, seen: Sequence[Row]) -> Iterator[Alive]:
    """The largest tensors at the measured peak of the rank that held the most."""
    courses = [course for rank in seen for course in rank["courses"] if course["phases"]]
    if not courses:
        return
    top = max(courses, key=lambda course: max(figures["bytes"] for figures in course["phases"].values()))
    phase = top["peak_phase"]
    place = states_place(forecast.hardware)
    terms = [term for term in forecast.ledger.at(place) if phase in term.alive and term.part != PROCESS_PART]
    for row in top["largest"]:
        yield Alive(
            bytes=row["bytes"],
            shape=tuple(row["shape"]),
            dtype=row["dtype"],
            module=row["module"],
            line=row["line"],
            term=_term_of(row["role"], row["owner"], terms),
        )


def _term_of(role: str, owner: str, terms: Sequence[Term]) -> str:
    """The id of the term that a tensor belongs to: of its part where there is one, else the first of its group."""
    group = next((name for name, roles in GROUPS.items() if role in roles), UNEXPLAINED)
    mine = [term.id for term in terms if group_of(term.id) == group]
    return next((name for name in mine if owner and name.endswith(f".{owner}")), mine[0] if mine else "")


def _notes(forecast: Forecast, seen: Sequence[Row]) -> Iterator[str]:
    for rank in seen:
        kept = max((course["kept_bytes"] for course in rank["courses"]), default=0)
        if kept > ALIGNMENT * ALIGNMENT:
            first = next(course["kept"][0] for course in rank["courses"] if course["kept_bytes"] == kept)
            yield (
                f"rank {rank['rank']}: {gib(kept)} that a step made are still alive at its end, the largest "
                f"{first['dtype']} {tuple(first['shape'])} of {first['module'] or 'no module'}, {first['line']}"
            )
        held: Sequence[Row] = max((course.get("held", []) for course in rank["courses"]), key=_sum_of, default=())
        if _sum_of(held) > ALIGNMENT * ALIGNMENT:
            first = held[0]
            yield (
                f"rank {rank['rank']}: {gib(_sum_of(held))} are alive at the peak and belong to nothing that is known, "
                f"the largest {first['dtype']} {tuple(first['shape'])}"
            )


def _sum_of(rows: Sequence[Row]) -> int:
    return sum(row["bytes"] for row in rows)
