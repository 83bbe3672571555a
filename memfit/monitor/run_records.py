"""A run folder as one record: what was planned, what happened, how it was judged. Reads only; needs no torch.

A report must work on what is there: a run that crashed has half a last line, one that was never evaluated has no eval
folder. What is missing is None or empty; what cannot be read is named in `problems`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memfit.errors import UserError
from memfit.specs.evaluation import Comparison, Evaluation

Row = Mapping[str, Any]

# Keys of a recipe that differ between runs without any difference in what was done.
_PLACES = frozenset({"run.folder"})
ABSENT = "—"


@dataclass(frozen=True)
class RunRecord:
    """Everything memfit wrote about one run. Events are the rows of run.jsonl, in their order."""

    path: Path
    name: str
    plan: Row = field(default_factory=dict)
    data: Row = field(default_factory=dict)
    events: tuple[Row, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    proof: Row = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def rows(self, event: str) -> list[Row]:
        """The events of one kind: start, step, eval, save, end, failed."""
        return [row for row in self.events if row.get("event") == event]

    def last(self, event: str) -> Row:
        """The latest event of one kind, or an empty row."""
        found = self.rows(event)
        return found[-1] if found else {}

    @property
    def steps(self) -> list[Row]:
        return self.rows("step")

    @property
    def recipe(self) -> Row:
        """The effective recipe; empty where plan.json could not be read."""
        return self.plan.get("recipe") or {}

    @property
    def forecast(self) -> Row:
        return self.plan.get("forecast") or {}

    @property
    def comparison(self) -> Comparison | None:
        """Base against tuned on the documents that the run is judged by; None where they were not compared."""
        by_name = {pair.tuned: pair for pair in self.comparisons}
        return by_name.get("tuned") or (self.comparisons[0] if self.comparisons else None)

    @property
    def tuned(self) -> Evaluation | None:
        """The evaluation that a summary speaks of: the compared one, else the first with pictures as they are."""
        pair = self.comparison
        wanted = pair.tuned if pair else "tuned"
        own = [row for row in self.evaluations if row.images == "as-is" and not row.name.startswith("base")]
        return self.evaluation(wanted) or (own[0] if own else None)

    @property
    def base(self) -> Evaluation | None:
        """What `tuned` is compared with."""
        pair = self.comparison
        return self.evaluation(pair.base if pair else "base")

    def evaluation(self, name: str) -> Evaluation | None:
        return next((row for row in self.evaluations if row.name == name), None)


def read_run(path: Path) -> RunRecord:
    """The record of the run in folder `path`. Raises UserError when there is nothing of a run in it."""
    known = [path / "plan.json", path / "run.jsonl", path / "eval"]
    if not path.is_dir():
        raise UserError(f"{path} is no folder", "give a run folder, as `memfit train` names it at its end")
    if not any(file.exists() for file in known):
        raise UserError(f"{path} holds no run: no plan.json, run.jsonl or eval", "give a folder that memfit train made")
    problems: list[str] = []
    events = _events(path / "run.jsonl", problems)
    evaluations, comparisons = _evaluations(path / "eval", problems)
    return RunRecord(
        path=path,
        name=path.resolve().name,
        plan=_object(path / "plan.json", problems),
        data=_object(path / "data.json", problems),
        events=events,
        evaluations=evaluations,
        comparisons=comparisons,
        proof=_object(path / "proof.json", problems) if (path / "proof.json").exists() else {},
        problems=tuple(problems),
    )


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """The records of several runs, each under its own name. Raises UserError for none, or for the first bad one."""
    if not paths:
        raise UserError("there are 0 runs to report on", "give at least one run folder")
    records = [read_run(Path(path)) for path in paths]
    names = [record.name for record in records]
    if len(set(names)) == len(names):
        return records
    return [_renamed(record, str(path)) for record, path in zip(records, paths, strict=True)]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as dotted keys; lists and plain values as they are."""
    if isinstance(value, Mapping) and value:
        return {key: leaf for name, child in value.items() for key, leaf in flat(child, f"{prefix}{name}.").items()}
    return {prefix.removesuffix("."): value}


def recipe_differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Recipe keys in which the runs differ, with each run's value as text; ABSENT where a run has no such key."""
    recipes = [flat(record.recipe) if record.recipe else {} for record in records]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    rows = []
    for key in keys:
        values = [value_text(recipe[key]) if key in recipe else ABSENT for recipe in recipes]
        if len(set(values)) > 1 and key not in _PLACES:
            rows.append((key, values))
    return rows


def value_text(value: Any) -> str:
    """A recipe's value as a person would write it in YAML."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and (value == 0 or 1e-3 <= abs(value) < 1e6):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False)


def number(value: Any) -> float | None:
    """A number of run.jsonl, or None: not measured, or written as text because it was not finite."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _renamed(record: RunRecord, name: str) -> RunRecord:
    return RunRecord(**{**vars(record), "name": name})


def _events(path: Path, problems: list[str]) -> tuple[Row, ...]:
    try:
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        problems.append("run.jsonl is missing: nothing was trained here yet")
        return ()
    except OSError as error:
        problems.append(f"run.jsonl cannot be read: {error.strerror}")
        return ()
    rows: list[Row] = []
    bad: list[int] = []
    for place, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows += [row] if row else []
        else:
            bad.append(place)
    if bad == [len(lines)]:
        problems.append(f"run.jsonl ends in the middle of line {bad[0]}: the run was cut off while it wrote")
    elif bad:
        problems.append(f"run.jsonl: {len(bad)} of {len(lines)} lines cannot be read, the first is line {bad[0]}")
    return tuple(rows)


def _object(path: Path, problems: list[str]) -> Row:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {_short(error)}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds no JSON object")
        return {}
    return value


def _evaluations(folder: Path, problems: list[str]) -> tuple[tuple[Evaluation, ...], tuple[Comparison, ...]]:
    evaluations: list[Evaluation] = []
    comparisons: list[Comparison] = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        row = _object(path, problems)
        try:
            if row.get("kind") == "comparison":
                comparisons.append(Comparison.from_json(row))
            elif row:
                evaluations.append(Evaluation.from_json({"name": path.stem} | dict(row)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"eval/{path.name} is no evaluation of this version: {_short(error)}")
    return tuple(_ordered(evaluations)), tuple(comparisons)


def _ordered(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Base before tuned, then controls, then other data; by name among equals."""

    def place(row: Evaluation) -> tuple[bool, bool, str]:
        plain = row.name in ("base", "tuned")
        return (row.images != "as-is", not plain, row.name)

    return sorted(evaluations, key=place)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0][:200]
