"""The Python API: one plain function a command, with the same words. `memfit.estimate`, `memfit.train` ... are these.

Importing this module loads no torch; the functions that need it load it when called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memfit.catalog.gpus import GPUS
from memfit.catalog.models import MODELS, ModelRow, find_row
from memfit.errors import DoesNotFit, UserError
from memfit.inputs.model_source import find_model, require_weights
from memfit.inputs.plan_file import is_plan_file, recipe_of_plan
from memfit.inputs.processes import prepare_environment
from memfit.inputs.recipe_file import load_recipe, override
from memfit.inputs.run_folder import new_run_folder, write_json
from memfit.planner.difference import difference
from memfit.planner.estimate_text import estimate_text, shortfall
from memfit.planner.plan import plan_json
from memfit.planner.user_engine import check_deepspeed_file, remarks
from memfit.specs.check import CheckReport, loaded_lines
from memfit.specs.deepspeed_file import DeepSpeedCheck, Finding
from memfit.specs.difference import Difference
from memfit.specs.evaluate import EvaluateRequest, EvaluateResult
from memfit.specs.export import ExportRequest, ExportResult
from memfit.specs.hardware import GpuRow
from memfit.specs.health import Health
from memfit.specs.plan import Forecast
from memfit.specs.recipe import Recipe
from memfit.specs.search import SearchResult
from memfit.specs.trace import Row
from memfit.specs.workload import LoaderLoad
from memfit.trace.data import data_of, names_data, scanned
from memfit.trace.forecast import forecast_plan, load_of, worst_rows
from memfit.trace.prepare import Prepared, hardware_of, prepare
from memfit.units import duration

Say = Callable[[str], None]
# (what is done, how many are done, how many there are or None)
Progress = Callable[[str, int, int | None], None]
RecipeLike = Recipe | Path | str | None


@dataclass(frozen=True)
class TrainResult:
    """What `train` did. `projected_seconds` stands after a pilot, which saves no model (`model` is None)."""

    folder: Path
    model: Path | None
    steps: int
    total_steps: int
    seconds: float
    loss: float | None
    projected_seconds: float | None

    def text(self, whole_command: str) -> str:
        """What a person reads after training; after a pilot, how long the whole run takes and how to start it."""
        if self.projected_seconds is not None:
            return (
                f"pilot: {self.steps} of {self.total_steps} steps in {duration(self.seconds)}; the whole run would "
                f"take about {duration(self.projected_seconds)}\nstart it with: {whole_command}"
            )
        loss = "-" if self.loss is None else f"{self.loss:.4f}"
        return (
            f"trained {self.steps} steps in {duration(self.seconds)}, last loss {loss}\nmodel: {self.model}\n"
            f"next: memfit eval {self.folder} --base, then memfit report {self.folder}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, paths as texts."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}


def read_recipe(recipe: RecipeLike = None, sets: Sequence[str] = (), model: str | None = None) -> Recipe:
    """A Recipe from a file (YAML, or a plan.json), from `model` and `sets` alone, or a Recipe with `sets` over it."""
    if isinstance(recipe, Recipe):
        return override(recipe, sets, model)
    if recipe is None and model is None and not any(text.startswith("model=") for text in sets):
        raise UserError("there is neither a recipe nor a model", "give a recipe file, or --model NAME")
    if recipe is not None and is_plan_file(Path(recipe)):
        return override(recipe_of_plan(Path(recipe)), sets, model)
    return load_recipe(Path(recipe) if recipe is not None else None, sets, model=model)


def estimate(
    recipe: RecipeLike = None, *, sets: Sequence[str] = (), model: str | None = None, say: Say = lambda text: None
) -> Forecast:
    """Forecast the memory of one run. What this version cannot forecast is None and named in `ledger.missing`.

    The worst micro-batch comes from the recipe's data where that file is here, else from its workload or the default.
    A model of the catalogue needs neither network nor files. `say` hears what could not be read.
    """
    wanted = read_recipe(recipe, sets, model)
    prepared = _prepared_with_data(wanted, say) if names_data(wanted) else prepare(wanted, catalogue=True)
    for line in remarks(wanted, prepared.hardware):
        say(line)
    return forecast_plan(prepared, *_worst_of_data(prepared, say)).forecast


def compare(
    first: RecipeLike, second: RecipeLike, *, sets: Sequence[str] = (), names: tuple[str, str] | None = None
) -> Difference:
    """Two forecasts and what the second has more or less, term by term; `sets` act on both recipes."""
    one, two = estimate(first, sets=sets), estimate(second, sets=sets)
    return difference(one, two, names or (_called(first), _called(second)))


def plan(
    recipe: RecipeLike = None, *, sets: Sequence[str] = (), model: str | None = None, say: Say = lambda text: None
) -> SearchResult:
    """Search every lever that is `auto`: what fits, fastest first, and why; what was refused, and by how much.

    Data and model are read as by `estimate`. `say` hears of every step that has to be traced. Nothing is written.
    """
    from memfit.trace.plan import plan_for

    wanted = read_recipe(recipe, sets, model)
    prepared = _prepared_with_data(wanted, say) if names_data(wanted) else prepare(wanted, catalogue=True)
    for line in remarks(wanted, prepared.hardware):
        say(line)
    scan = scanned(prepared, say)
    result = plan_for(prepared, data_of(prepared, scan), say)
    return result if scan is None else dataclasses.replace(result, samples=scan.samples)


def plot(forecasts: Forecast | Sequence[Forecast], path: Path, names: Sequence[str] = ()) -> Path:
    """Draw forecasts: stacked bars by phase and the course of one step. SVG, PNG or HTML by the suffix of `path`.

    UserError for another suffix, and where the file cannot be written.
    """
    from memfit.monitor.memory_picture import write_picture

    several = [forecasts] if isinstance(forecasts, Forecast) else list(forecasts)
    return write_picture(several, list(names) or [forecast.recipe.model for forecast in several], Path(path))


def check(
    recipe: RecipeLike = None,
    *,
    sets: Sequence[str] = (),
    model: str | None = None,
    quarantine: Path | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Scan the data of a recipe in the model's own units. Its verdict is "refused" when training would refuse."""
    from memfit.inputs.data import check_data
    from memfit.inputs.data.options import check_options
    from memfit.inputs.encode import Encoder

    wanted = read_recipe(recipe, sets, model)
    encoder = Encoder(find_model(wanted.model, wanted.model_config), wanted.image)
    return check_data(wanted.data, encoder, check_options(wanted, quarantine, progress))


def check_deepspeed(
    file: Path, recipe: RecipeLike = None, *, sets: Sequence[str] = (), model: str | None = None
) -> DeepSpeedCheck:
    """Read a DeepSpeed file and name what is wrong in it or has no effect; against a recipe, also forecast with it.

    Keys are those of the DeepSpeed that is installed, which is also asked whether it takes the file; without one, those
    of the list that comes along.
    """
    from memfit.engine.deepspeed_keys import complaint, keys_here

    alone = recipe is None and model is None and not any(text.startswith("model=") for text in sets)
    wanted = None if alone else read_recipe(recipe, sets, model)
    ranks = hardware_of(wanted).ranks if wanted else None
    found, config = check_deepspeed_file(Path(file), wanted, ranks, keys_here())
    refused = complaint(config) if not found.of("error") else None
    if refused:
        told = Finding("error", "DeepSpeed", refused, "mend that value")
        return dataclasses.replace(found, findings=(*found.findings, told))
    if wanted is None or found.of("error"):
        return found
    priced = estimate(dataclasses.replace(wanted, engine={**wanted.engine, "deepspeed": str(file)}))
    return dataclasses.replace(found, price=estimate_text(priced).partition("\n")[0])


def train(
    recipe: RecipeLike = None,
    *,
    sets: Sequence[str] = (),
    model: str | None = None,
    pilot: bool = False,
    say: Say = print,
    progress: Progress | None = None,
) -> TrainResult:
    """Check the data, forecast, fine-tune, save. Raises UserError, DoesNotFit or RunFailed."""
    wanted = read_recipe(recipe, sets, model)
    # Before accelerate imports DeepSpeed, which else looks for an accelerator and prints that it found none on stdout.
    prepare_environment(hardware_of(wanted).gpu is None)
    from memfit.build.build import Materials
    from memfit.build.device import device_for
    from memfit.build.supported import refuse_what_is_not_built
    from memfit.engine.host_ops import prepare_operators
    from memfit.engine.launch import run_job
    from memfit.engine.train import Job
    from memfit.inputs.data import load_samples
    from memfit.inputs.data.options import check_options
    from memfit.inputs.encode import Encoder
    from memfit.models import left_on_disk

    prepared = prepare(wanted)
    states = prepared.plan()
    _refuse_what_does_not_fit(states.forecast, say)
    refuse_what_is_not_built(states.recipe)
    device_for(prepared.hardware)  # a GPU that torch cannot use is told before anything is read or written
    for line in remarks(wanted, prepared.hardware):
        say(line)
    prepare_operators(states, say)
    source = require_weights(prepared.source)
    for line in left_on_disk(source.config, source.folder):
        say(line)
    encoder = Encoder(source, wanted.image)
    options = check_options(wanted, None, progress)
    loaded = load_samples(wanted.data, options, encoder)
    for line in loaded_lines(loaded, options.max_length):
        say(line)
    micro = int(states.recipe.levers.micro_batch)
    load = load_of(prepared, (*loaded.train_costs, *loaded.eval_costs), loaded.reading)
    rows = worst_rows(loaded.train, loaded.train_costs, encoder, micro, prepared.recipe.levers.packing)
    plan = forecast_plan(prepared, rows, load)
    _refuse_what_does_not_fit(plan.forecast, say)
    say(estimate_text(plan.forecast))
    # A pilot leaves the folder free that the whole run asks for.
    mark, pinned = "-pilot" if pilot else "", wanted.run.folder
    name = recipe.stem if isinstance(recipe, Path) else wanted.model
    folder = new_run_folder(pinned if pinned == "auto" else f"{pinned}{mark}", f"{name}{mark}")
    say(f"{len(loaded.train):,} samples to train on, {len(loaded.eval):,} to evaluate; run folder {folder.path}")
    write_json(folder.plan, plan_json(plan))
    write_json(folder.data, _data_json(loaded))
    materials = Materials(source, prepared.family, prepared.profile)
    done = run_job(Job(plan, materials, loaded.train, loaded.eval, folder, pilot, loaded.most_pixels))
    return TrainResult(
        folder=done.folder,
        model=None if pilot else done.model,
        steps=done.steps,
        total_steps=done.total_steps,
        seconds=done.seconds,
        loss=done.loss,
        projected_seconds=done.projected_seconds,
    )


def evaluate(request: EvaluateRequest, *, progress: Progress | None = None, say: Say = print) -> EvaluateResult:
    """Answer samples by free greedy decoding and score them. Raises UserError before anything is generated."""
    from memfit.engine.evaluate import evaluate as run_evaluation

    return run_evaluation(request, progress or (lambda what, done, total: None), say)


def report(runs: Sequence[Path], *, out: Path | None = None) -> tuple[str, Path]:
    """The text of a report on one run or several, and the path of the HTML file that was written beside it."""
    from memfit.monitor.report import write_report

    return write_report(runs, out)


def export(request: ExportRequest, *, say: Say = print) -> ExportResult:
    """Write a run's weights as one model (`to` merged) or as a PEFT adapter. Nothing that is there is replaced."""
    from memfit.engine.export import export as write

    return write(request, say)


def doctor(runs: Path = Path("runs")) -> Health:
    """What of this machine stands in the way of training, or will: each finding with its fix. Loads no torch.

    `runs` is where run folders will be made.
    """
    from memfit.inputs.health import Place, examine

    return examine(Place(runs=runs))


def gpus() -> tuple[GpuRow, ...]:
    """The GPUs that `hardware.gpus` knows."""
    return GPUS


def models() -> tuple[ModelRow, ...]:
    """The models that are known by name."""
    return MODELS


def _prepared_with_data(recipe: Recipe, say: Say) -> Prepared:
    """Reading samples takes the model's own files; where they cannot be had, the catalogue's facts must do."""
    try:
        return prepare(recipe)
    except UserError as error:
        if find_row(recipe.model) is None:
            raise
        say(f"{recipe.data.train} was not read, the default workload stands in: {error.problem}")
        return prepare(recipe, catalogue=True)


def _worst_of_data(prepared: Prepared, say: Say) -> tuple[tuple[Row, ...], LoaderLoad | None]:
    """The worst micro-batch of the recipe's data and what all of it makes of the loader; empty and None where the
    recipe names no file that is here."""
    micro = prepared.recipe.levers.micro_batch
    micro = micro if isinstance(micro, int) else 1
    data = data_of(prepared, scanned(prepared, say))
    return tuple(data.rows(micro)), data.load(micro)


def _called(recipe: RecipeLike) -> str:
    return recipe.model if isinstance(recipe, Recipe) else str(recipe)


def _refuse_what_does_not_fit(forecast: Forecast, say: Say) -> None:
    if forecast.fits is False:
        say(estimate_text(forecast))
        found = shortfall(forecast)
        raise DoesNotFit(
            f"this run does not fit {forecast.hardware.text}" + (f": {found}" if found else ""),
            "memfit estimate shows what is large; try method=lora, levers.checkpointing=full or a smaller image budget",
        )


def _data_json(loaded: Any) -> dict[str, Any]:
    return {
        "train": len(loaded.train),
        "eval": len(loaded.eval),
        "broken": [dataclasses.asdict(row) for row in loaded.broken],
        "shortened": [dataclasses.asdict(row) for row in loaded.shortened],
        "split": loaded.split.to_json(),
    }
