"""The sentences of a report: what was done, what it bought, and what a reader should worry about.

Every sentence is made from recorded numbers by a rule that stands here; text and HTML show the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from memfit.monitor.run_records import RunRecord, flat, number, recipe_differences
from memfit.specs.evaluation import SCORE_NAMES, Comparison, Score
from memfit.units import count_text, duration

# A model that still scores above this with wrong or blank pictures gets part of its answers from elsewhere.
CONTROL_LIMIT = 0.2
# Below this many documents an interval over documents is wide and its ends are uncertain.
FEW_DOCUMENTS = 30
# The final evaluation loss is called worse than the best where it is this much above it.
OVERFIT = 1.05
# Unreadable or cut answers up to this share are noted, above it they are a warning.
FEW = 0.01

Tone = Literal["good", "note", "warn"]


@dataclass(frozen=True)
class Finding:
    """One sentence and how it is meant: good news, a plain note, or a warning."""

    tone: Tone
    text: str


def headline(run: RunRecord) -> str:
    """The first sentence of a report: what fine-tuning changed, or how far the run got."""
    pair, tuned = run.comparison, run.tuned
    if pair is not None:
        gap = pair.difference["normalised"].get(pair.headline, Score(None))
        before = pair.before["normalised"].get(pair.headline, Score(None))
        after = pair.after["normalised"].get(pair.headline, Score(None))
        return (
            f"{_verb(gap)} {score_name(pair.headline)} on {pair.documents:,} documents from {figure(before.value)} "
            f"to {figure(after.value)}."
        )
    if tuned is not None:
        return (
            f"The model {tuned.name!r} reaches {score_name(tuned.headline)} {with_interval(tuned.score)} on "
            f"{tuned.parsing.documents:,} documents; it was not compared with the model it started from."
        )
    losses = [value for row in run.steps if (value := number(row.get("loss"))) is not None]
    if losses:
        return (
            f"Training loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {len(run.steps):,} steps; not evaluated."
        )
    return "Nothing was trained or evaluated in this run yet."


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """What was trained on what, in a few labelled figures; what is not recorded is left out."""
    recipe, start, end = run.recipe, run.last("start"), run.last("end")
    rows: list[tuple[str, str]] = []
    if recipe.get("model"):
        rows.append(("model", str(recipe["model"])))
    if recipe.get("method"):
        rows.append(("method", _method(recipe)))
    if train := (recipe.get("data") or {}).get("train"):
        rows.append(("data", str(train)))
    if start.get("samples") is not None:
        rows.append(("samples", f"{start['samples']:,} to train on, {start.get('eval_samples', 0):,} held out"))
    if trainable := start.get("trainable"):
        learning = sum(trainable.values())
        rows.append(("learning", f"{count_text(learning)} parameters in {', '.join(trainable)}"))
    if run.steps:
        rows.append(("steps", _steps(run)))
    if (seconds := number(end.get("seconds"))) is not None:
        rows.append(("time", duration(seconds)))
    if start.get("hardware"):
        rows.append(("hardware", str(start["hardware"])))
    return rows


def findings(run: RunRecord) -> list[Finding]:
    """Warnings and notes of one run, the gravest first."""
    rows = [
        *_progress(run),
        *_difference(run),
        *_controls(run),
        *_other_data(run),
        *_reading(run),
        *_loss(run),
        *(Finding("warn", f"{problem}.") for problem in run.problems),
    ]
    order = {"warn": 0, "note": 1, "good": 2}
    return sorted(rows, key=lambda row: order[row.tone])


def seed_summary(runs: Sequence[RunRecord]) -> str | None:
    """Mean and range of the tuned headline where runs differ in their seed alone; None otherwise."""
    scores = [run.tuned.score.value for run in runs if run.tuned is not None]
    values = [value for value in scores if value is not None]
    if len(values) < 2 or len(values) < len(runs) or [key for key, _ in recipe_differences(runs)] != ["seed"]:
        return None
    tuned = runs[0].tuned
    name = score_name(tuned.headline) if tuned else ""
    return (
        f"{len(runs)} runs that differ only in their seed: {name} {', '.join(map(figure, values))}; "
        f"mean {figure(sum(values) / len(values))}, from {figure(min(values))} to {figure(max(values))}."
    )


def shared_recipe(runs: Sequence[RunRecord]) -> list[str]:
    """Recipe keys with the same value in all runs."""
    different = {key for key, _ in recipe_differences(runs)}
    return [key for key in flat(runs[0].recipe) if key not in different]


# ---------------------------------------------------------------- rules


def _progress(run: RunRecord) -> Iterator[Finding]:
    failed, start, end = run.last("failed"), run.last("start"), run.last("end")
    done = number(run.steps[-1].get("step")) if run.steps else 0
    total = number(start.get("total_steps"))
    if failed:
        yield Finding("warn", f"The run failed after step {done:,.0f}: {failed.get('error', 'no reason was recorded')}")
    elif start and not end:
        of = f" of {total:,.0f}" if total else ""
        yield Finding("warn", f"The log ends at step {done:,.0f}{of} without an end: still running, or stopped.")
    if start.get("pilot"):
        yield Finding("note", "This was a pilot: the first steps of the schedule only, and no model was saved.")
    broken = run.data.get("broken")
    if broken:
        yield Finding("note", f"{len(broken):,} broken rows of the data were left out; memfit check lists them.")


def _difference(run: RunRecord) -> Iterator[Finding]:
    pair, tuned = run.comparison, run.tuned
    if pair is not None:
        gap = pair.difference["normalised"].get(pair.headline, Score(None))
        if gap.low is not None and gap.high is not None and gap.low <= 0 <= gap.high:
            yield Finding(
                "warn",
                f"The interval of the difference, {interval(gap, signed=True)}, includes 0: these {pair.documents:,} "
                "documents cannot tell the two models apart.",
            )
        elif gap.high is not None and gap.high < 0:
            yield Finding("warn", f"The tuned model is worse than the base, by {figure(-(gap.value or 0))}.")
        if pair.left_out:
            yield Finding("warn", f"Answered by one of the two models only, and left out: {_documents(pair.left_out)}.")
    if tuned is not None:
        score, documents = tuned.score, tuned.parsing.documents
        if documents < FEW_DOCUMENTS:
            yield Finding("note", f"Judged on {_documents(documents)} only: the intervals are rough.")
        elif score.low is not None and score.low == score.high:
            # Three mistakes in N are seen with 95% probability where each document has one with probability 3 / N.
            yield Finding(
                "note",
                f"All {documents:,} documents came out alike, so the interval has no width; mistakes in up to "
                f"{3 / documents:.1%} of documents could have gone unseen (rule of three).",
            )


def _controls(run: RunRecord) -> Iterator[Finding]:
    quiet = []
    for row in run.evaluations:
        if row.images == "as-is" or row.score.value is None:
            continue
        if row.score.value > CONTROL_LIMIT:
            yield Finding(
                "warn",
                f"With {row.images} pictures {row.name} still scores {figure(row.score.value)}: part of its answers "
                "does not come from the picture.",
            )
        else:
            quiet.append(f"{figure(row.score.value)} with {row.images} pictures")
    if quiet:
        yield Finding(
            "good", f"Control: the tuned model scores {' and '.join(quiet)}; its answers come from the picture."
        )


def _other_data(run: RunRecord) -> Iterator[Finding]:
    """Comparisons beside the main one: usually what was forgotten."""
    main, names = run.comparison, short_names([row.data for row in run.evaluations])
    for pair in run.comparisons:
        if main is None or pair.tuned == main.tuned:
            continue
        gap = pair.difference["normalised"].get(pair.headline, Score(None))
        row = run.evaluation(pair.tuned)
        where = f"On {names[row.data]}" if row is not None and row.data else "On other data"
        change = f"{pair.base} {_value(pair, 'before')}, {pair.tuned} {_value(pair, 'after')}"
        worse = gap.high is not None and gap.high < 0
        words = "some of what the base could do was forgotten" if worse else "no loss that these documents show"
        text = f"{where}: {change}, difference {with_interval(gap, signed=True)}; {words}."
        yield Finding("warn" if worse else "good", text)


def _reading(run: RunRecord) -> Iterator[Finding]:
    tuned = run.tuned
    if tuned is None:
        return
    parsing = tuned.parsing
    told = [
        (parsing.unparsable, "Answers that are no JSON and count as zero", ""),
        (parsing.unfinished, "Answers cut off", "; raise generate.max_new_tokens where they were not yet complete"),
        (parsing.truths_not_json, "Truths that are no JSON and were compared as plain text", ""),
        (parsing.repaired, "Answers repaired to valid JSON before scoring", ""),
        (parsing.duplicate_keys, "Answers with a key twice, of which the last value counts", ""),
        (parsing.repeated_ids, "Documents that repeat an id and were numbered apart", ""),
    ]
    for place, (count, what, more) in enumerate(told):
        tone: Tone = "warn" if place < 3 and count > FEW * parsing.documents else "note"
        if count:
            yield Finding(tone, f"{what}: {count:,} of {parsing.documents:,}{more}.")
    for name, count in tuned.normalised.skipped.items():
        yield Finding("note", f"Too large for {SCORE_NAMES.get(name, name)} and left out of it: {_documents(count)}.")


def _loss(run: RunRecord) -> Iterator[Finding]:
    losses = [(value, row.get("step")) for row in run.rows("eval") if (value := number(row.get("loss"))) is not None]
    if len(losses) >= 3:
        best, step = min(losses, key=lambda pair: pair[0])
        if losses[-1][0] > OVERFIT * best:
            yield Finding(
                "warn", f"Evaluation loss was lowest at step {step} ({best:.3f}) and ends at {losses[-1][0]:.3f}."
            )


# ---------------------------------------------------------------- words


def score_name(key: str) -> str:
    """The score as it stands in a sentence."""
    return SCORE_NAMES.get(key, key)


def figure(value: float | None) -> str:
    """A score with three digits; an en dash where there is none."""
    return "–" if value is None else f"{value:.3f}"


def interval(score: Score, signed: bool = False) -> str:
    """`0.91 to 0.95`, with signs where it is a difference."""
    if score.low is None or score.high is None:
        return "not known"
    low, high = (_signed(end) if signed else f"{end:.3f}" for end in (score.low, score.high))
    return f"{low} to {high}"


def with_interval(score: Score, signed: bool = False) -> str:
    """`0.937 (95% interval 0.921 to 0.951)`."""
    if score.value is None:
        return "–"
    value = _signed(score.value) if signed else figure(score.value)
    return value if score.low is None else f"{value} (95% interval {interval(score, signed)})"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _documents(count: int) -> str:
    return f"{count:,} document" + ("" if count == 1 else "s")


def short_names(texts: Sequence[str]) -> dict[str, str]:
    """Paths without the beginning and the end that all of them share; one path alone keeps its last two parts."""
    parts = {text: text.replace("\\", "/").split("/") for text in texts}
    if len(parts) < 2:
        return {text: "/".join(path[-2:]) for text, path in parts.items()}
    shortest = min(map(len, parts.values()))
    paths = list(parts.values())
    start = next((n for n in range(shortest) if len({path[n] for path in paths}) > 1), shortest - 1)
    end = next((n for n in range(shortest - start) if len({path[-1 - n] for path in paths}) > 1), 0)
    return {text: "/".join(path[start : len(path) - end]) for text, path in parts.items()}


def _value(pair: Comparison, part: str) -> str:
    scores: dict[str, Any] = getattr(pair, part)
    return figure(scores["normalised"].get(pair.headline, Score(None)).value)


def _verb(gap: Score) -> str:
    if gap.low is not None and gap.low > 0:
        return "Fine-tuning raised"
    if gap.high is not None and gap.high < 0:
        return "Fine-tuning lowered"
    return "Fine-tuning moved"


def _method(recipe: Any) -> str:
    """The method, and the parts that are treated otherwise than its one word says."""
    other = [f"{part} {way}" for part, way in (recipe.get("parts") or {}).items() if way != recipe["method"]]
    return f"{recipe['method']} ({', '.join(other)})" if other else str(recipe["method"])


def _steps(run: RunRecord) -> str:
    step, total = run.steps[-1].get("step"), run.last("start").get("total_steps")
    text = f"{step:,}" + (f" of {total:,}" if total and total != step else "") if isinstance(step, int) else "?"
    epoch = number(run.steps[-1].get("epoch"))
    return text if epoch is None else f"{text} ({epoch:.3g} {'epoch' if epoch == 1 else 'epochs'})"
