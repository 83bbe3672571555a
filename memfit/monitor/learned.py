"""What differs between runs in what decides what is learned: as they wrote it when they began, and by step as measured.

Runs with the same recipe can differ here (another number of GPUs, another template in the model's folder), and runs
with different recipes can be the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from memfit.monitor.run_records import ABSENT, RunRecord, flat, number, value_text

# Keys of the start event's `learning` (memfit.engine.learned) in the words of the report.
WORDS: Mapping[str, str] = {
    "samples_per_step": "samples a step",
    "split_of_step": "a step is",
    "loss": "loss",
    "betas": "betas",
    "eps": "eps",
    "clip": "gradient clipping",
    "dtypes": "elements that learn",
    "decay.value": "weight decay",
    "decay.tensors": "tensors with decay",
    "decay.spared": "tensors without decay",
    "decay.names": "which have none (digest)",
    "adapters": "adapters",
    "adapters.modules": "modules with adapters",
    "adapters.names": "which modules (digest)",
    "adapters.alpha_over_r": "adapters' scale (alpha / r)",
    "adapters.rank": "adapters' rank",
    "adapters.init": "adapters begin as",
    "adapters.dtype": "adapters' dtype",
    "image": "image budget",
    "template": "template and labels (digest)",
}
MEASURED = {"tokens": "tokens a step, mean", "trained_tokens": "trained tokens a step, mean"}
SAME = "What decides what is learned is the same: tokens, loss, adapters, decay, image budget, template."
NEAR = 1e-6  # means of the same numbers, added up otherwise


def learning_differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """(what, each run's value) of all that differs; ABSENT where a run did not write it."""
    written = [_written(run) for run in runs]
    rows = []
    for key in dict.fromkeys(key for one in written for key in one):
        values = [value_text(one[key]) if key in one else ABSENT for one in written]
        if len(set(values)) > 1:
            rows.append((_words(key), values))
    for key, words in MEASURED.items():
        means = [_mean(run, key) for run in runs]
        known = [mean for mean in means if mean is not None]
        if known and (len(known) < len(means) or max(known) - min(known) > NEAR * max(known)):
            rows.append((words, [ABSENT if mean is None else f"{mean:,.1f}" for mean in means]))
    return rows


def says_what_it_learned(run: RunRecord) -> bool:
    """Whether a run wrote what it learned by: older ones did not."""
    return bool(run.last("start").get("learning"))


def _written(run: RunRecord) -> dict[str, Any]:
    found = run.last("start").get("learning")
    return flat(found) if isinstance(found, Mapping) and found else {}


def _words(key: str) -> str:
    if key in WORDS:
        return WORDS[key]
    first, _, rest = key.partition(".")
    return f"{WORDS.get(first, first)}: {rest}" if rest else key


def _mean(run: RunRecord, key: str) -> float | None:
    values = [value for row in run.steps if (value := number(row.get(key))) is not None]
    return statistics.fmean(values) if values else None
