"""The run reads its own levers back before its first step: its process, or its model, is not the proof's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from memfit.engine.readback.live import Facts, Live
from memfit.engine.readback.read import read_back
from memfit.errors import ProofFailed
from memfit.specs.plan import Plan


class ReadAgain(TrainerCallback):
    """Stops a run as it begins where something asked for is not in effect. Takes no step and draws no chance.

    `make` gives the live objects once everything is prepared.
    """

    def __init__(self, make: Callable[[], Live], plan: Plan, facts: Facts) -> None:
        self._make, self._plan, self._facts = make, plan, facts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wrong = [check for check in read_back(self._make(), self._plan, self._facts) if check.ok is False]
        if wrong:
            first = wrong[0]
            raise ProofFailed(
                f"the run is not what was proved: {first.lever}: asked {first.asked}, found {first.found} "
                f"({first.evidence})",
                first.fix or "start the run again; if it comes back, report it with proof.json",
            )
