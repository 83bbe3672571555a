"""The user's data as forecasts take them: worst micro-batches of any number of rows, and what the loader holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from memfit.catalog.models import find_row
from memfit.errors import UserError
from memfit.specs.check import Loaded, shortened_text
from memfit.specs.recipe import Recipe
from memfit.specs.trace import Row
from memfit.specs.workload import LoaderLoad
from memfit.specs.workload_scan import WorkloadScan
from memfit.trace.forecast import load_from, load_of, worst_rows
from memfit.trace.planning import NO_DATA, Data, Say
from memfit.trace.prepare import Prepared, prepare

if TYPE_CHECKING:
    from memfit.inputs.encode import Encoder


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


def data_loaded(prepared: Prepared, loaded: Loaded, encoder: Encoder) -> Data:
    """The worst micro-batches of samples that are loaded for training, and what all of them make of the loader."""
    known: dict[int, tuple[Row, ...]] = {}

    def rows(micro: int) -> tuple[Row, ...]:
        if micro not in known:
            packing = prepared.recipe.levers.packing
            known[micro] = worst_rows(loaded.train, loaded.train_costs, encoder, micro, packing)
        return known[micro]

    return Data(rows, lambda micro: loader_of(prepared, loaded, micro))


def loader_of(prepared: Prepared, loaded: Loaded, micro: int) -> LoaderLoad:
    """What the loader holds of samples that are loaded, in micro-batches of so many rows."""
    levers = dataclasses.replace(prepared.recipe.levers, micro_batch=micro)
    with_micro = dataclasses.replace(prepared, recipe=dataclasses.replace(prepared.recipe, levers=levers))
    return load_of(with_micro, (*loaded.train_costs, *loaded.eval_costs), loaded.reading)


def data_of(prepared: Prepared, scan: WorkloadScan | None, say: Say = lambda text: None) -> Data:
    """The worst micro-batches of a scan and what all of it makes of the loader."""
    if scan is None:
        return NO_DATA
    inside = scan.inside()
    figures = {name: values[inside] for name, values in scan.figures.items()}

    def load(micro: int) -> LoaderLoad:
        levers = dataclasses.replace(prepared.recipe.levers, micro_batch=micro)
        recipe = dataclasses.replace(prepared.recipe, levers=levers)
        return load_from(dataclasses.replace(prepared, recipe=recipe), figures, scan.reading)

    def under(recipe: Recipe) -> Data:
        other = dataclasses.replace(prepared, recipe=recipe)
        return data_of(other, scanned(other, say), say)

    worst = scan.worst_batch(1, "patches")
    return Data(
        rows=lambda micro: scan.batch_rows(micro, packing=prepared.recipe.levers.packing),
        load=load,
        longest=max((sample.cost.tokens for sample in scan.worst_batch(1, "tokens")), default=None),
        heaviest=worst[0].images if worst else (),
        pictures=tuple(dict.fromkeys(cost for costs, _ in scan.pictures for cost in costs)),
        under=under,
    )


def prepared_with_data(recipe: Recipe, say: Say) -> Prepared:
    """Reading samples takes the model's own files; where they cannot be had, the catalogue's facts must do."""
    try:
        return prepare(recipe)
    except UserError as error:
        if find_row(recipe.model) is None:
            raise
        say(f"{recipe.data.train} was not read, the default workload stands in: {error.problem}")
        return prepare(recipe, catalogue=True)


def ready_to_plan(wanted: Recipe, say: Say) -> tuple[Prepared, Data, int | None]:
    """A recipe made ready for a search, its data, and how many samples they have (None without data)."""
    prepared = prepared_with_data(wanted, say) if names_data(wanted) else prepare(wanted, catalogue=True)
    scan = scanned(prepared, say)
    return prepared, data_of(prepared, scan, say), None if scan is None else scan.samples


def worst_of_data(prepared: Prepared, say: Say) -> tuple[tuple[Row, ...], LoaderLoad | None]:
    """The worst micro-batch of the recipe's data and what all of it makes of the loader; empty and None where the
    recipe names no file that is here."""
    micro = prepared.recipe.levers.micro_batch
    micro = micro if isinstance(micro, int) else 1
    data = data_of(prepared, scanned(prepared, say))
    return tuple(data.rows(micro)), data.load(micro)
