"""What of memfit's own reading back holds for a script that no recipe describes: judged, or told and left to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from memfit.specs.proof import Check

# Told by `memfit.engine.foreign.asked` in the script's own words.
TWICE = (
    "levers.parallel",
    "levers.offload",
    "levers.pin_memory",
    "levers.optimizer",
    "levers.micro_batch",
    "batch",
    "schedule.learning_rate",
    "schedule.kind",
    "schedule.clip",
    "levers.checkpointing (",
    "levers.activation_offload",
    "levers.attention (",
    "levers.autocast",
    "lora.targets",
    "lora.rank",
    "lora.alpha",
    "lora scale",
    "quantised modules",
    "image budget",
)
NOT_ASKED = "nothing in the script asks for it: "


def judged(checks: Iterable[Check], trainer: Any) -> Iterator[Check]:
    """The checks that are left. One that judges by memfit's own rules is told where a script may mean it so."""
    evaluates = trainer.eval_dataset is not None and str(trainer.args.eval_strategy.value) != "no"
    for check in checks:
        if check.ok is None and check.lever.startswith(TWICE):
            continue
        if check.lever == "evaluation keeps" and not evaluates:
            continue
        yield _told(check) if _may_be_meant(check, trainer) else check


def _may_be_meant(check: Check, trainer: Any) -> bool:
    if check.ok is not False:
        return False
    if check.lever.startswith("reading "):
        return True  # objects that memfit does not know, in a script that it did not write
    if check.lever == "graph of frozen parts":
        # transformers hooks the embedding of an adapted model that is checkpointed: that keeps no byte by itself.
        return all(" 0 B kept" in part for part in check.found.split("; "))
    if check.lever == "labels":
        asks = any(getattr(trainer.args, name, False) for name in ("completion_only_loss", "assistant_only_loss"))
        return "without any" not in check.found and not asks
    return False


def _told(check: Check) -> Check:
    return dataclasses.replace(check, ok=None, evidence=NOT_ASKED + check.evidence)
