"""A plan from a forecast. This version searches nothing: a plan is the pinned values and the documented defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

from memfit.planner.forecast_json import forecast_json
from memfit.specs.plan import Forecast, Plan


def plan_of(forecast: Forecast) -> Plan:
    """The plan that runs a forecast's effective recipe as it is."""
    layout = forecast.layout
    if layout is None:
        raise ValueError("a forecast without a layout is no plan")
    reasons = ("pinned by the recipe, or the documented default; nothing was searched",)
    return Plan(recipe=forecast.recipe, layout=layout, forecast=forecast, tier=1, reasons=reasons)


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan as plan.json holds it."""
    return {
        "recipe": plan.recipe.to_json(),
        "layout": dataclasses.asdict(plan.layout),
        "forecast": forecast_json(plan.forecast),
        "tier": plan.tier,
        "reasons": list(plan.reasons),
    }
