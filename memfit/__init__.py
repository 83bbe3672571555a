"""memfit: memory-aware fine-tuning for multimodal language models.

`memfit.estimate`, `memfit.plan`, `memfit.check`, `memfit.train`, `memfit.evaluate`, `memfit.report`, `memfit.export`
and `memfit.doctor` do what the commands of the same names do; `memfit.prove` proves a Trainer of your own script.
Importing memfit does nothing else: torch is loaded only by what needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memfit.api import (
        check,
        check_deepspeed,
        compare,
        doctor,
        estimate,
        evaluate,
        export,
        gpus,
        plan,
        plan_answers,
        plot,
        plot_plan,
        prove,
        read_recipe,
        report,
        train,
        why_not,
    )

__version__ = "0.1.0.dev0"
__all__ = [
    "__version__",
    "check",
    "check_deepspeed",
    "compare",
    "doctor",
    "estimate",
    "evaluate",
    "export",
    "gpus",
    "plan",
    "plan_answers",
    "plot",
    "plot_plan",
    "prove",
    "read_recipe",
    "report",
    "train",
    "why_not",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from memfit import api

        return getattr(api, name)
    raise AttributeError(f"module 'memfit' has no attribute {name!r}")
