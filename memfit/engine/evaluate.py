"""Evaluate a run or a model: build what answers, score it, and put the results where the report finds them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from memfit.build.build import Materials, build
from memfit.errors import UserError
from memfit.evaluation.controls import CONTROLS
from memfit.evaluation.generate import GenerateOptions
from memfit.evaluation.results import compare
from memfit.evaluation.run import Subject, answer_and_score
from memfit.inputs.data import load_samples
from memfit.inputs.data.options import check_options
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import require_weights
from memfit.inputs.recipe_file import load_recipe, override, recipe_from
from memfit.inputs.run_folder import RunFolder, is_run_folder, open_run_folder, read_json, write_json
from memfit.specs.evaluate import EvaluateRequest, EvaluateResult
from memfit.specs.evaluation import Comparison, Evaluation
from memfit.specs.recipe import Data, Recipe
from memfit.specs.sample import Sample
from memfit.trace.prepare import Prepared, prepare

BATCH = 16  # answers decoded together; a batch that does not fit is halved by the caller's --set levers.micro_batch


def evaluate(
    request: EvaluateRequest, progress: Callable[[str, int, int | None], None], say: Callable[[str], None]
) -> EvaluateResult:
    """Answer by free greedy decoding and score. Raises UserError before anything is generated."""
    run = open_run_folder(Path(request.run_or_model)) if is_run_folder(Path(request.run_or_model)) else None
    recipe = _recipe(request, run)
    names = _names(request, run)
    prepared = prepare(recipe)
    prepared = dataclasses.replace(prepared, source=require_weights(prepared.source))
    samples = _samples(request, run, prepared)
    say(f"{len(samples):,} samples, greedy decoding, images {request.images}")
    evaluations = []
    for name in names:
        trained = run.model if run is not None and not name.startswith("base") else None
        built = build(prepared.plan(), Materials(prepared.source, prepared.family, prepared.profile), trained)
        subject = _subject(request, recipe, name, str(trained or prepared.source.name))
        options = GenerateOptions(recipe.generate.max_new_tokens, BATCH, request.images, recipe.seed)
        evaluations.append(answer_and_score(built, samples, subject, options, functools.partial(progress, name)))
    comparison = None
    if len(evaluations) == 2:
        comparison = compare(evaluations[0], evaluations[1], seed=recipe.seed)
    return EvaluateResult(tuple(evaluations), comparison, _write(request, run, evaluations, comparison))


def _recipe(request: EvaluateRequest, run: RunFolder | None) -> Recipe:
    """The run's own recipe, image budget included, so that evaluation sees what training saw."""
    if request.images not in CONTROLS:
        raise UserError(f"--images {request.images!r} is unknown", f"use one of {', '.join(CONTROLS)}")
    if run is None:
        if request.base:
            raise UserError("--base compares with the model a run started from", "give a run folder instead of a model")
        return load_recipe(None, request.sets, model=request.run_or_model)
    recipe = recipe_from(read_json(run.plan)["recipe"], str(run.plan))
    if not run.model.is_dir():
        raise UserError(f"{run.path} holds no trained model", "finish the training, or evaluate a checkpoint folder")
    return override(recipe, request.sets)


def _names(request: EvaluateRequest, run: RunFolder | None) -> tuple[str, ...]:
    """Names of the results: tuned, base, tuned-shuffled ...; a name given by the user stands for the tuned model."""
    mark = "" if request.images == "as-is" else f"-{request.images}"
    own = request.name or (f"tuned{mark}" if run is not None else f"model{mark}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", own):
        raise UserError(f"--name {own!r} is no plain name", "use letters, digits, dots and dashes")
    if own.startswith("base"):
        raise UserError(f"--name {own}: names that begin with base are the starting model's", "choose another name")
    if not request.base:
        return (own,)
    return (f"base{own.removeprefix('tuned')}" if own.startswith("tuned") else f"base-{own}", own)


def _samples(request: EvaluateRequest, run: RunFolder | None, prepared: Prepared) -> Sequence[Sample]:
    """The samples of --data, or those that the run held out. Broken rows are an error: every document counts."""
    recipe = prepared.recipe
    encoder = Encoder(prepared.source, recipe.image)
    options = check_options(recipe)
    if request.data is not None:
        data = Data(
            train=str(request.data), eval=None, image_root=recipe.data.image_root, max_broken=0.0, limit=request.limit
        )
        if run is not None and str(request.data) != recipe.data.train:
            data = dataclasses.replace(data, image_root=None)
        return load_samples(data, options, encoder).train
    if recipe.data.train is None:
        raise UserError("there is no data to evaluate on", "give --data FILE")
    loaded = load_samples(recipe.data, options, encoder)
    held_out = loaded.eval
    if not held_out:
        raise UserError("this run held no samples out", "give --data FILE")
    if run is not None and read_json(run.data)["split"] != loaded.split.to_json():
        raise UserError(
            f"{recipe.data.train} has changed since the run: what was held out then may not be what is held out now",
            "give --data FILE with samples that the run has not seen",
        )
    return held_out[: request.limit]


def _subject(request: EvaluateRequest, recipe: Recipe, name: str, model: str) -> Subject:
    data = str(request.data) if request.data is not None else f"{recipe.data.train} (held out)"
    return Subject(name, model, data, recipe.seed)


def _write(
    request: EvaluateRequest,
    run: RunFolder | None,
    evaluations: Sequence[Evaluation],
    comparison: Comparison | None,
) -> tuple[Path, ...]:
    """eval/NAME.json in the run folder, and --out. A result of the same name is kept under a number, not replaced."""
    written = []
    results: list[tuple[str, dict[str, Any]]] = [(item.name, item.to_json()) for item in evaluations]
    if comparison is not None:
        own = evaluations[-1].name
        results.append(("comparison" if own == "tuned" else f"comparison-{own}", comparison.to_json()))
    if run is not None:
        for name, value in results:
            path = run.evaluations / f"{name}.json"
            _set_aside(path)
            write_json(path, value)
            written.append(path)
    if request.out is not None:
        content = results[0][1] if len(results) == 1 else dict(results)
        write_json(request.out, content)
        written.append(request.out)
    return tuple(written)


def _set_aside(path: Path) -> None:
    """Rename an earlier result to NAME.1.json.old, NAME.2.json.old ...: the report reads only *.json."""
    if not path.exists():
        return
    number = 1
    while (older := path.with_name(f"{path.stem}.{number}.json.old")).exists():
        number += 1
    path.rename(older)
