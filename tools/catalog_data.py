"""Write the numbers that memfit ships for catalogued models: parameters, and the steps of the documented defaults.

    python tools/catalog_data.py                        all of them anew (some minutes)
    python tools/catalog_data.py --only llama-3.2-1b    one model's, beside what is there

They are what a forecast would have cached on this machine, packed. Keys hold the versions of torch and transformers, so
that another version finds nothing here and traces for itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memfit import api
from memfit.catalog.models import MODELS
from memfit.inputs.cache import installed_versions
from memfit.inputs.shipped import packed
from memfit.trace import step

DATA = Path(__file__).parents[1] / "memfit" / "catalog" / "data"
# What most people ask first. A trace holds for every card; a replay of the allocator is of one.
CARDS = ("1xRTX3090", "1xRTX4090", "1xA100-40G", "1xA100-80G", "1xH100-80G")
METHODS = ("full", "lora")
KINDS = ("profiles", "traces", "replays")


def pack(cache: Path) -> int:
    """Pack every file of a cache folder; returns the bytes of all that is shipped then."""
    for file in sorted(cache.rglob("*.json")):
        target = DATA / file.relative_to(cache).parent / f"{file.name}.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(packed(_without_times(json.loads(file.read_text(encoding="utf-8")))))
    (DATA / "versions.json").write_text(json.dumps(dict(installed_versions())) + "\n", encoding="utf-8")
    return sum(file.stat().st_size for kind in KINDS for file in (DATA / kind).iterdir())


def _without_times(value: dict[str, object]) -> dict[str, object]:
    """How long a trace took is a fact of this machine's day, not of the model."""
    trace = value.get("trace")
    if isinstance(trace, dict) and "seconds" in trace:
        trace["seconds"] = 0.0
    return value


class _TracedOnce:
    """The tracer, which a model's next card gets the last answer of: a cached trace has no events to replay."""

    def __init__(self, trace: Callable[..., Any]) -> None:
        self._trace = trace
        self._last: tuple[Any, Any] = (None, None)

    def __call__(self, request: Any, *other: Any) -> Any:
        # A trace is of a kind of device, not of a card.
        alike = dataclasses.replace(request, recipe=dataclasses.replace(request.recipe, hardware="auto"))
        if self._last[0] != alike:
            self._last = (alike, self._trace(request, *other))
        return self._last[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one catalogue name")
    only = parser.parse_args().only
    if only is None:
        for kind in KINDS:  # tapes are tools/catalog_tapes.py's
            shutil.rmtree(DATA / kind, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MEMFIT_CACHE"] = folder
        tracing = _TracedOnce(step.trace_step)
        step.trace_step = tracing  # type: ignore[assignment]
        for row in MODELS:
            if only in (None, row.name):
                for method in METHODS:
                    took = time.monotonic()
                    for card in CARDS:
                        api.estimate(model=row.name, sets=[f"method={method}", f"hardware.gpus={card}"])
                    print(f"{row.name}: {method}, {time.monotonic() - took:.1f} s", flush=True)
        size = pack(Path(folder))
    print(f"{size / 1024:.0f} KiB in {DATA.relative_to(DATA.parents[2])}")
    return 0 if size < 1 << 20 else 1


if __name__ == "__main__":
    raise SystemExit(main())
