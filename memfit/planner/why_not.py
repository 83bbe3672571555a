"""Why not X? Answered from what plan.json says of every combination that was searched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from memfit.errors import UserError
from memfit.planner.problems import listed
from memfit.units import duration, gib

PLACES = {"gpu": "on the GPU", "host": "in host memory"}


def why_not(data: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Lines on the combinations in which every key of `wanted` has that value, the most telling first.

    `data`: a plan.json as `memfit plan` writes it. UserError where it says nothing of a key.
    """
    table = data.get("candidates")
    if not isinstance(table, Mapping) or not table.get("rows"):
        raise UserError("this plan does not say what became of each candidate", "memfit plan writes a plan that does")
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    chosen = data.get("chosen", data if "recipe" in data else None)  # a run's plan.json is its plan
    recipe = chosen["recipe"] if chosen else None
    said = ", ".join(f"{key}={_word(value)}" for key, value in wanted.items())
    for key, value in wanted.items():
        if key not in rows[0] or not key.startswith("levers."):
            kept = _at(recipe, key)
            stayed = f"; it stayed {_word(kept)}" if kept is not None else ""
            raise UserError(
                f"{key} was not searched{stayed}", f"memfit plan RECIPE --set {key}={_word(value)} searches with it"
            )
    found = [row for row in rows if all(_same(row[key], value) for key, value in wanted.items())]
    if not found:
        return list(_absent(rows, wanted, said))
    if recipe is not None and all(_same(_at(recipe, key), value) for key, value in wanted.items()):
        return [f"{said} is what was chosen"]
    best = _chosen_row(rows, recipe)
    for row in rows:
        row["timed"] = bool(table.get("timed"))
    for row in found:
        _judged(row, data.get("refused", ()))
    lines = [f"why not {said}: {len(found)} combination{'s' * (len(found) > 1)} of levers"]
    return [*lines, *(f"  {line}" for line in _states(found, best))]


def _judged(row: dict[str, Any], refused: Sequence[Mapping[str, Any]]) -> None:
    """The few refusals that were judged whole have their figure from the allocator's replay, or the whole node."""
    for one in refused:
        same = all(_same(row[key], value) for key, value in one["levers"].items() if key in row)
        if row["state"] == "refused" and same and not one["at_least"]:
            row["short_by_bytes"], row["exact"] = one["short_by_bytes"], True


def _states(found: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None) -> Iterator[str]:
    fits = sorted((row for row in found if row["state"] == "fits"), key=lambda row: row["seconds"])
    untried = sorted((row for row in found if row["state"] == "untried"), key=lambda row: row["seconds"])
    refused = sorted((row for row in found if row["state"] == "refused"), key=lambda row: row["short_by_bytes"])
    if fits:
        row = fits[0]
        yield f"fits: {_words(row)}: {_needs(row)}, {_beside(row, best)}" + (f" ({row['why']})" if row["why"] else "")
    if untried:
        row = next((one for one in untried if not one["why"]), untried[0])
        reason = row["why"] or _beside(row, best)
        yield f"not looked at: {len(untried)}; the fastest of them, {_words(row)}: at least {_needs(row)}; {reason}"
    if refused:
        row = refused[0]
        least = "" if row["exact"] else "at least "
        words = _words(row, alone=not row["exact"])
        yield (
            f"refused: {len(refused)}; the closest, {words}: needs {least}{gib(row['short_by_bytes'])} more "
            f"{PLACES[row['place']]}"
        )


def _beside(row: Mapping[str, Any], best: Mapping[str, Any] | None) -> str:
    """A row's speed beside the chosen plan's."""
    least = "at least " if not row["exact"] else ""
    if not row["timed"]:
        times = row["seconds"] / best["seconds"] if best and best["seconds"] else 1.0
        return f"{least}{times:.2f} times the work of the chosen one (no rates are known here)"
    if best is None:
        return f"{least}{duration(row['seconds'])} a step"
    times = row["seconds"] / best["seconds"]
    how = f"{times:.2f} times as long as the chosen {duration(best['seconds'])}"
    if row["tier"] > best["tier"]:
        how += f", and tier {row['tier']} where tier {best['tier']} fits"
    return f"{least}{duration(row['seconds'])} a step, {how}"


def _absent(rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any], said: str) -> Iterator[str]:
    yield f"why not {said}: no combination has it: it does not go together with what is pinned, or with this hardware"
    for key, value in wanted.items():
        values = list(dict.fromkeys(_word(row[key]) for row in rows))
        if _word(value) not in values:
            yield f"  {key} was searched as {listed(values, 'and')}"


def _chosen_row(rows: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if recipe is None:
        return None
    levers = [key for key in rows[0] if key.startswith("levers.")]
    fits = [row for row in rows if row["state"] == "fits"]
    return next((row for row in fits if all(_same(_at(recipe, key), row[key]) for key in levers)), None)


def _words(row: Mapping[str, Any], alone: bool = False) -> str:
    """A combination; with `alone` what decides its states only, because they alone are too much."""
    texts = [str(row["levers.parallel"]), str(row["levers.precision"])]
    if row["levers.optimizer"] != "adamw":
        texts.append(row["levers.optimizer"])
    if row["levers.offload"] != "none":
        to = f" to {row['levers.offload_to']}" if row["levers.offload_to"] != "host" else ""
        texts.append(f"offload {row['levers.offload']}{to}")
    if alone:
        return ", ".join(texts)
    texts += [f"checkpointing {_word(row['levers.checkpointing'])}", f"loss {row['levers.loss']}"]
    texts += ["activation offload"] * bool(row["levers.activation_offload"])
    return ", ".join([*texts, f"micro-batch {row['levers.micro_batch']}"])


def _needs(row: Mapping[str, Any]) -> str:
    gpu = f"{gib(row['gpu_bytes'])} a GPU, " if row["gpu_bytes"] is not None else ""
    return f"{gpu}{gib(row['host_bytes'])} of host memory"


def _at(recipe: Mapping[str, Any] | None, key: str) -> Any:
    place: Any = recipe
    for name in key.split("."):
        place = place.get(name) if isinstance(place, Mapping) else None
    return place


def _same(one: Any, other: Any) -> bool:
    return _word(one) == _word(other)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
