"""The forecasts of several cells, each written as soon as it is there, before or beside the measurements."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy_gpu.cells import Cell, batch_of, facts_of, prepared_of
from benchmarks.accuracy_gpu.records import write_record
from memfit.errors import MemfitError
from memfit.planner.forecast_json import forecast_json
from memfit.specs.trace import Row
from memfit.trace.forecast import forecast_plan


def predict(cells: Sequence[Cell], gpus: str, rehearse: bool, folder: Path) -> None:
    """Write `<id>.forecast.json` for every cell; a refusal is a record too."""
    for cell in cells:
        start = time.monotonic()
        try:
            prepared, _ = prepared_of(cell, gpus, rehearse)
            batch = batch_of(cell, prepared)
            rows = tuple(map(Row, batch.rows, batch.images or ((),)))
            found = forecast_json(forecast_plan(prepared, rows).forecast)
            value = {name: found[name] for name in ("verdict", "fits", "gpu", "host", "interval", "speed", "missing")}
            value |= {"cell": facts_of(cell, prepared), "hardware": found["hardware"]}
        except MemfitError as error:
            value = {"cell": {"id": cell.id}, "error": str(error)}
        write_record(folder / f"{cell.id}.forecast.json", value | {"seconds": time.monotonic() - start})
