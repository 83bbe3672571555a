"""What stops `memfit train` before anything runs, and what it writes of its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from memfit.errors import DoesNotFit
from memfit.planner.answer import levers_text
from memfit.planner.estimate_text import estimate_text, shortfall
from memfit.specs.hardware import Hardware
from memfit.specs.plan import Forecast, Plan
from memfit.specs.search import SearchResult

Say = Callable[[str], None]


def chosen_plan(found: SearchResult, hardware: Hardware) -> Plan:
    """The plan that was chosen; DoesNotFit with what lacks least where there is none."""
    if found.chosen is not None:
        return found.chosen
    closest = (
        f": the closest {found.refused[0].reason} ({levers_text(found.refused[0].levers)})" if found.refused else ""
    )
    raise DoesNotFit(
        f"nothing that may be chosen fits {hardware.text}{closest}",
        "memfit plan says what lacks what, and what would help",
    )


def refuse_what_does_not_fit(forecast: Forecast, say: Say) -> None:
    """Raises DoesNotFit with what is short, after the whole forecast was told."""
    if forecast.fits is False:
        say(estimate_text(forecast))
        found = shortfall(forecast)
        raise DoesNotFit(
            f"this run does not fit {forecast.hardware.text}" + (f": {found}" if found else ""),
            "memfit estimate shows what is large; try method=lora, levers.checkpointing=full or a smaller image budget",
        )


def data_json(loaded: Any) -> dict[str, Any]:
    """What a run's data.json holds."""
    return {
        "train": len(loaded.train),
        "eval": len(loaded.eval),
        "broken": [dataclasses.asdict(row) for row in loaded.broken],
        "shortened": [dataclasses.asdict(row) for row in loaded.shortened],
        "split": loaded.split.to_json(),
    }
