"""The difference of two forecasts for people: verdicts, what the recipes say differently, terms, phases."""

from __future__ import annotations

from typing import Any

from memfit.planner.estimate_text import aligned
from memfit.specs.difference import Difference, RunFacts, TermChange
from memfit.specs.ledger import PHASES
from memfit.units import gib


def difference_text(difference: Difference) -> str:
    """The whole answer of `memfit estimate RECIPE RECIPE2` as text."""
    first, second = difference.first, difference.second
    lines = [f"A {first.name}: {_figures(first)}", f"B {second.name}: {_figures(second)}", ""]
    lines += _recipe(difference)
    if difference.changed:
        lines += ["", *_terms(difference)]
    else:
        lines += ["", "every term is the same"]
    lines += ["", *_phases(difference), ""]
    both = [words for words in first.missing if words in second.missing]
    for who, words in (
        ("A or B", both),
        ("A", [words for words in first.missing if words not in both]),
        ("B", [words for words in second.missing if words not in both]),
    ):
        lines += [f"not forecast yet for {who}: {', '.join(words)}"] if words else []
    return "\n".join(lines)


def _figures(run: RunFacts) -> str:
    verdict = run.verdict.replace("-", " ")
    room = "" if run.capacity is None else f" of {gib(run.capacity)}"
    if run.process is not None and run.reserved is not None and run.allocated is not None:
        peak = f"{gib(run.reserved)} reserved, {gib(run.allocated)} allocated in {run.peak_phase}"
        return f"{verdict}, the process peaks at {gib(run.process)}{room}; {peak}"
    if run.allocated is not None:
        return f"{verdict}, {gib(run.allocated)}{room} at the peak, in {run.peak_phase}"
    return f"{verdict}, {gib(max(run.known.values()))}{room} in the terms that are forecast"


def _recipe(difference: Difference) -> list[str]:
    if not difference.keys:
        return ["the recipes say the same"]
    rows = [["recipe key", "", "A", "B"]]
    rows += [[row.key, "", _value(row.first), _value(row.second)] for row in difference.keys]
    return aligned(rows, total=False)


def _value(value: Any, limit: int = 48) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _terms(difference: Difference) -> list[str]:
    rows = [["term", "", "place", "A", "B", "B - A"]]
    for row in difference.changed:
        rows.append([row.id, _kind(row), row.place, _size(row.first), _size(row.second), signed(row.change)])
    if difference.equal:
        same = sum(row.first or 0 for row in difference.equal)
        count = len(difference.equal)
        rows.append([f"{count} equal term{'s' if count > 1 else ''}", "same", "", gib(same), gib(same), signed(0)])
    return aligned(rows, total=False)


def _kind(row: TermChange) -> str:
    if row.first is None:
        return "only B"
    if row.second is None:
        return "only A"
    return "changed" if row.change else "other phases"


def _phases(difference: Difference) -> list[str]:
    """What is alive in each phase where the states are, of both runs, and the difference."""
    one, two = difference.first, difference.second
    if not difference.whole:
        changes = {phase: two.known[phase] - one.known[phase] for phase in PHASES}
        rows = [["terms alive in", "", *PHASES]]
        rows += [[letter, "", *(gib(run.known[phase]) for phase in PHASES)] for letter, run in (("A", one), ("B", two))]
        return aligned([*rows, ["B - A", "", *(signed(changes[phase]) for phase in PHASES)]])
    shown = [name for name in PHASES if one.phases.get(name) is not None or two.phases.get(name) is not None]
    rows = [["phase", "", *shown]]
    for letter, run in (("A", one), ("B", two)):
        rows.append([letter, "", *(_size(run.phases.get(phase)) for phase in shown)])
    return aligned([*rows, ["B - A", "", *(signed(difference.phase_change(phase)) for phase in shown)]])


def _size(size: int | None) -> str:
    return "-" if size is None else gib(size)


def signed(size: int | None) -> str:
    """Bytes with a sign: +1.20 GiB, -300.00 MiB, 0; "-" where there is no figure."""
    if size is None:
        return "-"
    return "0" if size == 0 else f"{'+' if size > 0 else '-'}{gib(abs(size))}"
