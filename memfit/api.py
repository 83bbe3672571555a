"""The Python API: one plain function a command, with the same words. `memfit.estimate`, `memfit.train` ... are these.

Importing this module loads no torch; the functions that need it load it when called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from memfit.catalog.gpus import GPUS
from memfit.catalog.models import MODELS, ModelRow
from memfit.errors import UserError
from memfit.inputs.model_source import find_model, require_weights
from memfit.inputs.plan_file import is_plan_file, recipe_of_plan
from memfit.inputs.processes import prepare_environment
from memfit.inputs.recipe_file import load_recipe, override, parse_set
from memfit.inputs.run_folder import new_run_folder, write_json
from memfit.inputs.sweep_values import parse_sweep
from memfit.planner.answer import search_json
from memfit.planner.difference import difference
from memfit.planner.estimate_text import estimate_text
from memfit.planner.plan import plan_json
from memfit.planner.plan_text import levers_line
from memfit.planner.user_engine import check_deepspeed_file, remarks
from memfit.specs.check import CheckReport, loaded_lines
from memfit.specs.deepspeed_file import DeepSpeedCheck, Finding
from memfit.specs.difference import Difference
from memfit.specs.evaluate import EvaluateRequest, EvaluateResult
from memfit.specs.export import ExportRequest, ExportResult
from memfit.specs.hardware import GpuRow
from memfit.specs.health import Health
from memfit.specs.plan import Forecast
from memfit.specs.proof import Proof
from memfit.specs.recipe import Recipe
from memfit.specs.search import Answer, SearchResult
from memfit.specs.train import TrainResult
from memfit.trace.data import (
    data_loaded,
    data_of,
    loader_of,
    names_data,
    prepared_with_data,
    ready_to_plan,
    scanned,
    worst_of_data,
)
from memfit.trace.forecast import forecast_plan
from memfit.trace.prepare import hardware_of, prepare
from memfit.trace.sweep import held_plan
from memfit.trace.sweep import sweep as sweep_of
from memfit.trace.worst import worst_plan

Say = Callable[[str], None]
# (what is done, how many are done, how many there are or None)
Progress = Callable[[str, int, int | None], None]
RecipeLike = Recipe | Path | str | None


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
    prepared = prepared_with_data(wanted, say) if names_data(wanted) else prepare(wanted, catalogue=True)
    for line in remarks(wanted, prepared.hardware):
        say(line)
    return forecast_plan(prepared, *worst_of_data(prepared, say)).forecast


def compare(
    first: RecipeLike, second: RecipeLike, *, sets: Sequence[str] = (), names: tuple[str, str] | None = None
) -> Difference:
    """Two forecasts and what the second has more or less, term by term; `sets` act on both recipes."""
    one, two = estimate(first, sets=sets), estimate(second, sets=sets)
    return difference(one, two, names or (_called(first), _called(second)))


def plan(
    recipe: RecipeLike = None,
    *,
    sets: Sequence[str] = (),
    model: str | None = None,
    sweep: str | None = None,
    questions: bool = False,
    say: Say = lambda text: None,
) -> SearchResult:
    """Search every lever that is `auto`: what fits, fastest first, and why; what was refused, and by how much.

    Data and model are read as by `estimate`. `sweep` ("workload.tokens=1024..8192") also forecasts the chosen plan, or
    the closest, at other values of one key; `questions` also answers what people ask (`plan_answers`). `say` hears of
    every step that is traced. Nothing is written.
    """
    from memfit.trace.plan import plan_for

    moved = parse_sweep(sweep) if sweep is not None else None
    wanted = read_recipe(recipe, sets, model)
    prepared, data, samples = ready_to_plan(wanted, say)
    for line in remarks(wanted, prepared.hardware):
        say(line)
    result = dataclasses.replace(plan_for(prepared, data, say), samples=samples)
    if moved is not None:
        result = dataclasses.replace(result, sweep=sweep_of(*moved, held_plan(result, wanted), estimate, say))
    if questions:
        result = dataclasses.replace(result, answers=tuple(plan_answers(result, wanted, say=say)))
    return result


def plan_answers(
    result: SearchResult,
    recipe: RecipeLike = None,
    *,
    sets: Sequence[str] = (),
    model: str | None = None,
    say: Say = lambda text: None,
) -> Iterator[Answer]:
    """What people ask of the plan that `plan` chose for a recipe, one answer at a time: how long samples may be, how
    many crops may stay, what one more GPU buys, what the smallest hardware is. None where nothing was chosen.
    """
    from memfit.trace.questions import answers

    if result.ranked:
        prepared, data, _ = ready_to_plan(read_recipe(recipe, sets, model), lambda text: None)
        yield from answers(prepared, result.ranked[0], data, say)


def why_not(plan_file: Path, wanted: Sequence[str]) -> list[str]:
    """Why a plan.json chose no plan with these `key=value`s: what refused them, or how much slower they are, in lines.

    UserError for a file without the candidates of a search, and for keys that were not searched.
    """
    from memfit.inputs.plan_file import read_plan_file
    from memfit.planner.why_not import why_not as answered

    pairs = dict(parse_set(text) for text in wanted)
    return answered(read_plan_file(Path(plan_file)), {".".join(key): value for key, value in pairs.items()})


def plot(forecasts: Forecast | Sequence[Forecast], path: Path, names: Sequence[str] = ()) -> Path:
    """Draw forecasts: stacked bars by phase and the course of one step. SVG, PNG or HTML by the suffix of `path`.

    UserError for another suffix, and where the file cannot be written.
    """
    from memfit.monitor.memory_picture import write_picture

    several = [forecasts] if isinstance(forecasts, Forecast) else list(forecasts)
    return write_picture(several, list(names) or [forecast.recipe.model for forecast in several], Path(path))


def plot_plan(result: SearchResult, path: Path, name: str) -> Path:
    """Draw a plan: memory against speed of all that was searched, the ranked plans as bars, and its sweep.

    SVG, PNG or HTML by the suffix of `path`; UserError for another, and where the file cannot be written.
    """
    from memfit.monitor.plan_picture import write_plan_picture

    return write_plan_picture(result, name, Path(path))


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
    proof: Literal["full", "quick", "only"] = "full",
    say: Say = print,
    progress: Progress | None = None,
) -> TrainResult:
    """Check the data, forecast, prove, fine-tune, save. Raises UserError, DoesNotFit, ProofFailed or RunFailed.

    `proof`: "quick" skips save and reload, as a pilot's does; "only" stops behind a full one. `say` hears its card.
    """
    wanted = read_recipe(recipe, sets, model)
    # Before accelerate imports DeepSpeed, which else looks for an accelerator and prints that it found none on stdout.
    prepare_environment(hardware_of(wanted).gpu is None)
    from memfit.build.build import Materials
    from memfit.build.device import device_for
    from memfit.build.supported import refuse_what_is_not_built
    from memfit.engine.host_ops import prepare_operators
    from memfit.engine.launch import prove_job, run_job
    from memfit.engine.refusals import chosen_plan, data_json, refuse_what_does_not_fit
    from memfit.engine.train import Job, count_steps
    from memfit.inputs.data import load_samples
    from memfit.inputs.data.options import check_options
    from memfit.inputs.encode import Encoder
    from memfit.models import left_on_disk
    from memfit.trace.plan import choose, plan_for

    prepared = prepare(wanted)
    refuse_what_is_not_built(prepared.plan().recipe)
    device_for(prepared.hardware)  # a GPU that torch cannot use is told before anything is read or written
    for line in remarks(wanted, prepared.hardware):
        say(line)
    if wanted.goal == "long":  # its data are cut to what fits: that is planned before they are read
        found = plan_for(prepared, data_of(prepared, scanned(prepared, say), say), say, wanted=1)
        wanted = chosen_plan(found, prepared.hardware).recipe
        say("\n".join(("plan: " + levers_line(wanted), *found.ranked[0].reasons)))
        prepared = prepare(wanted)
    source = require_weights(prepared.source)
    for line in left_on_disk(source.config, source.folder):
        say(line)
    encoder = Encoder(source, wanted.image)
    options = check_options(wanted, None, progress)
    loaded = load_samples(wanted.data, options, encoder)
    for line in loaded_lines(loaded, options.max_length):
        say(line)
    searched = choose(prepared, data_loaded(prepared, loaded, encoder), say)
    if searched is not None:
        prepared = dataclasses.replace(prepared, recipe=chosen_plan(searched, prepared.hardware).recipe)
    micro = int(prepared.plan().recipe.levers.micro_batch)
    load = loader_of(prepared, loaded, micro)
    plan, worst = worst_plan(prepared, (loaded.train, loaded.train_costs), encoder, load)
    if searched is not None and searched.chosen is not None:
        plan = dataclasses.replace(plan, tier=searched.chosen.tier, reasons=searched.chosen.reasons)
        say(f"plan: {levers_line(plan.recipe)} (of {searched.searched:,} candidates)\n  " + "\n  ".join(plan.reasons))
    refuse_what_does_not_fit(plan.forecast, say)
    prepare_operators(plan, say)
    say(estimate_text(plan.forecast))
    # A pilot leaves the folder free that the whole run asks for.
    mark, pinned = "-pilot" if pilot else "", wanted.run.folder
    name = recipe.stem if isinstance(recipe, Path) else wanted.model
    folder = new_run_folder(pinned if pinned == "auto" else f"{pinned}{mark}", f"{name}{mark}")
    say(f"{len(loaded.train):,} samples to train on, {len(loaded.eval):,} to evaluate; run folder {folder.path}")
    write_json(folder.plan, {**plan_json(plan), **(search_json(searched) if searched else {})})
    write_json(folder.data, data_json(loaded))
    materials = Materials(source, prepared.family, prepared.profile)
    known = (loaded.train_costs, loaded.eval_costs, worst)
    job = Job(plan, materials, loaded.train, loaded.eval, folder, pilot, loaded.most_pixels, *known)
    shown = prove_job(job, "quick" if pilot or proof == "quick" else "full", say, quiet=proof == "only")
    if proof == "only":
        total = count_steps(plan.recipe, len(job.train), plan.forecast.hardware.ranks).total
        return TrainResult(folder.path, None, 0, total, float(shown["seconds"]), None, None)
    done = run_job(job)
    return TrainResult(
        folder=done.folder,
        model=None if pilot else done.model,
        steps=done.steps,
        total_steps=done.total_steps,
        seconds=done.seconds,
        loss=done.loss,
        projected_seconds=done.projected_seconds,
    )


def prove(trainer: Any, *, folder: Path | None = None, strict: bool = False, say: Say = print) -> Proof:
    """Prove a transformers or TRL Trainer of your own before it trains, and change nothing of it: `prove_trainer`.

    `say` hears the card, `folder` gets proof.json. `Proof.failed` names what is not in effect: with `strict`, an error.
    """
    from memfit.engine.foreign.prove import Options, prove_trainer

    return prove_trainer(trainer, Options(folder, strict, say))


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


def _called(recipe: RecipeLike) -> str:
    return recipe.model if isinstance(recipe, Recipe) else str(recipe)
