"""Write the tapes that memfit ships for catalogued models: steps as exact functions of rows and tokens.

    python tools/catalog_tapes.py --only llama-3.2-1b --method lora    one model (one to ten minutes)
    python tools/catalog_tapes.py --missing                            those that are not there
    python tools/catalog_tapes.py                                      all of them

A tape is shipped where traces that it was not made of equal it to the byte; the others are said, and traced when asked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from memfit import api
from memfit.catalog.models import MODELS, ModelRow
from memfit.inputs.shipped import packed
from memfit.inputs.tape_store import FOLDER, load_tapes, store_tapes
from memfit.specs.trace import TraceBatch
from memfit.trace.forecast import step_request, tapes_key
from memfit.trace.prepare import prepare
from memfit.trace.recording import Recording
from memfit.trace.step import recorded_step
from memfit.trace.tapes import make_tapes

DATA = Path(__file__).parents[1] / "memfit" / "catalog" / "data"
METHODS = ("lora", "full")
CARD = "1xA100-80G"  # any with bf16: a step is of a kind of device, not of a card
LONGEST = 8192
# A picture of ten crops is thousands of windows in a loop of Python: recordings of several rows took more than 20 GB
# (measured 2026-11-22).
ONE_ROW = ("minicpm-v-4.6",)


def write(row: ModelRow, method: str, missing: bool, several: bool) -> None:
    """Make and store the tapes of one model and method, with the documented defaults for everything else.

    With `missing`, only where none are there; without `several`, of one row only.
    """
    start = time.monotonic()
    recipe = api.read_recipe(model=row.name, sets=[f"method={method}", f"hardware.gpus={CARD}"])
    prepared = prepare(recipe, catalogue=True)
    request = step_request(prepared)
    key = tapes_key(prepared.profile, request)
    if missing and load_tapes(key):
        print(f"{row.name} {method}: there", flush=True)
        return
    costs = request.batch.images[0] if request.batch.images else ()
    shortest = sum(cost.tokens + 16 * len(cost.crops) for cost in costs) or 256

    def record(rows: int, tokens: int) -> Recording:
        batch = TraceBatch((tokens,) * rows, (costs,) * rows)
        return recorded_step(dataclasses.replace(request, batch=batch))[0]

    tapes = make_tapes(record, shortest, LONGEST, several)
    if tapes:
        store_tapes(key, tapes)
    holds = ", ".join(f"rows {one.domain.rows[0]}-{one.domain.rows[1]} padded {one.domain.padded}" for one in tapes)
    took = time.monotonic() - start
    print(f"{row.name} {method}: {holds or 'no tape'}; {took:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one catalogue name")
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--missing", action="store_true", help="leave alone what is there")
    given = parser.parse_args()
    only, methods = given.only, METHODS if given.method is None else (given.method,)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MEMFIT_CACHE"] = folder
        for row in MODELS:
            for method in methods if only in (None, row.name) else ():
                write(row, method, given.missing, row.name not in ONE_ROW)
        target = DATA / FOLDER
        if only is None and given.method is None and not given.missing:
            shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True, exist_ok=True)
        for file in Path(folder, FOLDER).glob("*.json"):
            (target / f"{file.name}.gz").write_bytes(packed(json.loads(file.read_text(encoding="utf-8"))))
    print(f"{sum(file.stat().st_size for file in target.iterdir()) / 1024:.0f} KiB in {FOLDER}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
