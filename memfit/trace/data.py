"""The user's data as forecasts take them: worst micro-batches of any number of rows, and what the loader holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from memfit.specs.check import shortened_text
from memfit.specs.recipe import Recipe
from memfit.specs.workload import LoaderLoad
from memfit.specs.workload_scan import WorkloadScan
from memfit.trace.forecast import load_from
from memfit.trace.planning import NO_DATA, Data, Say
from memfit.trace.prepare import Prepared


def names_data(recipe: Recipe) -> bool:
    """Whether the worst sample is to be read from a file that is here."""
    return recipe.workload == "auto" and recipe.data.train is not None and Path(recipe.data.train).exists()


def scanned(prepared: Prepared, say: Say) -> WorkloadScan | None:
    """The scan of the recipe's data; None where it names no file that is here. How many broken rows are too many is
    for `check` and `train` to say."""
    recipe = prepared.recipe
    if not names_data(recipe) or prepared.source.folder is None:
        return None
    # Imported here and not above: a forecast without data answers in half the time.
    from memfit.inputs.data.workload import scan_workload
    from memfit.inputs.encode import Encoder

    scan = scan_workload(recipe, Encoder(prepared.source, recipe.image))
    if scan.shortened:
        say(shortened_text(scan.shortened, scan.samples, scan.max_length))
    return scan


def data_of(prepared: Prepared, scan: WorkloadScan | None) -> Data:
    """The worst micro-batches of a scan and what all of it makes of the loader."""
    if scan is None:
        return NO_DATA
    inside = scan.inside()
    figures = {name: values[inside] for name, values in scan.figures.items()}

    def load(micro: int) -> LoaderLoad:
        levers = dataclasses.replace(prepared.recipe.levers, micro_batch=micro)
        recipe = dataclasses.replace(prepared.recipe, levers=levers)
        return load_from(dataclasses.replace(prepared, recipe=recipe), figures, scan.reading)

    return Data(lambda micro: scan.batch_rows(micro, packing=prepared.recipe.levers.packing), load)
