"""The difference of two forecasts, term by term: terms are joined by their ids, which are stable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from memfit.planner.activations import peak_of, phase_table
from memfit.planner.estimate import capacity_bytes, states_place
from memfit.planner.verdict import process_bytes
from memfit.specs.difference import Difference, KeyChange, RunFacts, TermChange
from memfit.specs.ledger import Term
from memfit.specs.plan import Forecast

Key = tuple[str, str]  # id and place: a term may have bytes in two places


def difference(first: Forecast, second: Forecast, names: Sequence[str] = ("first", "second")) -> Difference:
    """What the second run has more or less than the first. `names` is what the runs are called in text."""
    one, two = _joined(first), _joined(second)
    changed: list[TermChange] = []
    same: list[TermChange] = []
    for key in dict.fromkeys([*one, *two]):
        a, b = one.get(key), two.get(key)
        (same if _same(a, b) else changed).append(_change(a, b))
    return Difference(
        first=_facts(first, names[0]),
        second=_facts(second, names[1]),
        keys=tuple(_keys(first.recipe.to_json(), second.recipe.to_json())),
        changed=tuple(sorted(changed, key=lambda row: (-abs(row.change), row.id))),
        equal=tuple(same),
    )


def _joined(forecast: Forecast) -> dict[Key, Term]:
    return {(term.id, term.place): term for term in forecast.ledger.terms}


def _same(one: Term | None, two: Term | None) -> bool:
    return one is not None and two is not None and (one.bytes, set(one.alive)) == (two.bytes, set(two.alive))


def _change(one: Term | None, two: Term | None) -> TermChange:
    term = two or one
    assert term is not None
    return TermChange(
        id=term.id,
        name=term.name,
        part=term.part,
        place=term.place,
        alive=term.alive,
        first=one.bytes if one else None,
        second=two.bytes if two else None,
    )


def _facts(forecast: Forecast, name: str) -> RunFacts:
    peak = peak_of(forecast)
    return RunFacts(
        name=name,
        verdict=forecast.verdict,
        fits=forecast.fits,
        peak_phase=peak[0] if peak else None,
        allocated=peak[1] if peak else None,
        reserved=forecast.reserved.peak_reserved if forecast.reserved else None,
        process=process_bytes(forecast),
        capacity=capacity_bytes(forecast.hardware),
        phases=dict(phase_table(forecast)),
        known=forecast.ledger.phase_bytes(states_place(forecast.hardware)),
        missing=forecast.ledger.missing,
    )


def _keys(one: Mapping[str, Any], two: Mapping[str, Any], prefix: str = "") -> Iterator[KeyChange]:
    """Recipe keys with different values, nested ones dotted."""
    for key in dict.fromkeys([*one, *two]):
        a, b = one.get(key), two.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _keys(a, b, f"{prefix}{key}.")
        elif a != b:
            yield KeyChange(prefix + key, a, b)
