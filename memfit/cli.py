"""The command line: a thin face over `memfit.api`. Data on stdout, progress on stderr, exit codes as documented."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from memfit import __version__
from memfit.errors import MemfitError
from memfit.trace.collection import one_answer

app = typer.Typer(
    name="memfit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Memory-aware fine-tuning for multimodal language models: forecast, plan, check, train, evaluate, report.",
    epilog="Exit codes: 0 done; 1 user error; 2 bad command line; 3 does not fit; 4 proof failed; 5 run failed.",
)

RecipeArgument = Annotated[Path | None, typer.Argument(metavar="RECIPE", help="A recipe (YAML); see docs/recipe.md.")]
SecondArgument = Annotated[
    Path | None, typer.Argument(metavar="RECIPE2", help="A second recipe: print what it changes, term by term.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one recipe key; may be repeated.")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Catalogue name, hub id, local folder or config.json; in place of a recipe's model."),
]
GpusOption = Annotated[str | None, typer.Option("--gpus", metavar="2xRTX3090", help="Hardware; see `memfit gpus`.")]
HostOption = Annotated[str | None, typer.Option("--host-memory", metavar="128GiB", help="Host memory of one machine.")]


class ProofOption(enum.StrEnum):
    """How much is proved before a run."""

    full = "full"
    quick = "quick"
    only = "only"


PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw it: a file ending in .svg, .png or .html.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"memfit {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = None,
) -> None:
    """Options before the command."""


@app.command()
def estimate(
    recipe: RecipeArgument = None,
    second: SecondArgument = None,
    set_: SetOption = None,
    model: ModelOption = None,
    gpus: GpusOption = None,
    host_memory: HostOption = None,
    why: Annotated[str | None, typer.Option("--why", metavar="ID", help="Formula and source of one term.")] = None,
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Forecast the memory of one run, without a GPU and without weights; of two, their difference term by term."""
    from memfit import api
    from memfit.planner.estimate_text import estimate_text
    from memfit.planner.estimate_text import why as explain
    from memfit.planner.forecast_json import forecast_json

    recipes = [recipe] if second is None else [recipe, second]
    sets = _sets(set_, gpus, host_memory)
    forecasts = []
    for one in recipes:
        with _tracing(one or model, as_json):
            forecasts.append(api.estimate(one, sets=sets, model=model, say=_say))
    names = _run_names(recipes, [forecast.recipe.model for forecast in forecasts])
    if plot is not None:
        _say(f"picture: {api.plot(forecasts, plot, names)}")
    if why:
        print("\n\n".join(explain(forecast, why) for forecast in forecasts))
    elif len(forecasts) == 2:
        _print_difference(api.difference(forecasts[0], forecasts[1], names), as_json)
    elif as_json:
        _print_json(forecast_json(forecasts[0]))
    else:
        print(estimate_text(forecasts[0]))
    if any(forecast.fits is False for forecast in forecasts):
        raise typer.Exit(3)


@app.command()
def plan(
    recipe: RecipeArgument = None,
    set_: SetOption = None,
    model: ModelOption = None,
    gpus: GpusOption = None,
    host_memory: HostOption = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the plan is written.")] = Path("plan.json"),
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", metavar="KEY=a..b", help="How memory moves over one key: a..b, a..b..step or a,b,c."),
    ] = None,
    plot: PlotOption = None,
    why_not: Annotated[
        list[str] | None,
        typer.Option("--why-not", metavar="KEY=VALUE", help="Why not this lever? Of a plan.json, without a search."),
    ] = None,
    brief: Annotated[
        bool, typer.Option("--brief", help="Only search: no answers on longer samples, more crops, other hardware.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Search every lever left auto: the fastest set-up that fits, its reasons, and what was refused by how much."""
    from memfit.commands.plan import PlanRequest, run_plan

    sets = tuple(_sets(set_, gpus, host_memory))
    request = PlanRequest(recipe, sets, model, out, sweep, plot, tuple(why_not or ()), brief, as_json)
    raise typer.Exit(run_plan(request, _say))


@app.command()
def check(
    recipe: RecipeArgument = None,
    set_: SetOption = None,
    model: ModelOption = None,
    quarantine: Annotated[
        Path | None,
        typer.Option("--quarantine", metavar="FOLDER", help="Folder for the lists of broken rows (JSON lines)."),
    ] = None,
    deepspeed: Annotated[
        Path | None,
        typer.Option("--deepspeed", metavar="FILE", help="Check this DeepSpeed file instead; with a recipe, price it."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Scan the data: broken rows with their reasons, quality, leaks, tokens and crops, the worst sample."""
    from memfit import api
    from memfit.inputs.data.check_text import report_lines

    if deepspeed is not None:
        found = api.check_deepspeed(deepspeed, recipe, sets=_sets(set_), model=model)
        _print_json(found.to_json()) if as_json else print(found.text())
        raise typer.Exit(1 if found.verdict == "refused" else 0)
    report = api.check(recipe, sets=_sets(set_), model=model, quarantine=quarantine, progress=_counter())
    if as_json:
        _print_json(report.to_json())
    else:
        print("\n".join(report_lines(report)))
    if report.verdict == "refused":
        raise typer.Exit(1)


@app.command()
def train(
    recipe: RecipeArgument = None,
    set_: SetOption = None,
    model: ModelOption = None,
    gpus: GpusOption = None,
    pilot: Annotated[
        bool, typer.Option("--pilot", help="Run a small share first, then tell how long the whole run takes.")
    ] = False,
    proof: Annotated[
        ProofOption,
        typer.Option("--proof", help="Before the run: full; quick saves and reloads nothing; only stops behind it."),
    ] = ProofOption.full,
    as_json: JsonOption = False,
) -> None:
    """Check the data, forecast, prove on the worst batches, fine-tune, and save the model in a run folder."""
    from memfit import api

    result = api.train(
        recipe,
        sets=_sets(set_, gpus),
        model=model,
        pilot=pilot,
        proof=proof.value,
        say=_say,
        progress=_counter(),
    )
    if proof is ProofOption.only:
        _show_proof(result.folder / "proof.json", as_json)
        return
    if as_json:
        _print_json(result.to_json())
    else:
        print(result.text(_whole_command()))


@app.command("eval")
def evaluate(
    run_or_model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, model folder or hub id.")],
    data: Annotated[Path | None, typer.Option("--data", help="The samples to answer; default: the run's own.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Also evaluate the model that the run started from.")] = False,
    images: Annotated[
        str, typer.Option("--images", help="as-is, or a control: shuffled (another sample's), blank (white).")
    ] = "as-is",
    name: Annotated[str | None, typer.Option("--name", help="Name of the result in the run folder.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N samples.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Also write the result here.")] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer the samples by greedy decoding and score the fields; with --base, before against after."""
    from memfit import api
    from memfit.monitor.evaluation_text import evaluation_text

    request = api.EvaluateRequest(run_or_model, data, base, images, name, limit, out, tuple(set_ or ()))
    result = api.evaluate(request, progress=_counter(), say=_say)
    if as_json:
        _print_json(result.to_json())
    else:
        print(evaluation_text(result.evaluations, result.comparison))
        for path in result.written:
            print(f"written: {path}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The HTML file; default: report.html in the run.")
    ] = None,
) -> None:
    """What happened against what was forecast: text here, and one self-contained HTML file."""
    from memfit import api

    text, path = api.report(runs, out=out)
    print(text)
    print(f"\nreport: {path}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a checkpoint folder in one.")],
    to: Annotated[str, typer.Option("--to", metavar="KIND", help="merged (one model) or adapter (PEFT).")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Default: RUN/exported/KIND.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Hand a run over: a model folder that transformers loads, or an adapter that PEFT loads."""
    from memfit import api
    from memfit.units import gib

    made = api.export(api.ExportRequest(run, to, out), say=_say)
    if as_json:
        _print_json(made.to_json())
    else:
        print("\n".join((f"{made.to}: {made.folder} ({gib(made.bytes)})", *made.notes)))


@app.command()
def doctor(
    runs: Annotated[Path, typer.Option("--runs", metavar="FOLDER", help="Where run folders will be made.")] = Path(
        "runs"
    ),
    as_json: JsonOption = False,
) -> None:
    """What of this machine stands in the way of training, each with its fix; exit 1 when training is impossible."""
    from memfit import api

    health = api.doctor(runs)
    _print_json(health.to_json()) if as_json else print(health.text())
    if health.verdict == "fail":
        raise typer.Exit(1)


@app.command()
def gpus(as_json: JsonOption = False) -> None:
    """The GPUs that --gpus knows, with their usable memory and where the figure is from."""
    from memfit import api
    from memfit.monitor.catalog_text import gpus_text

    rows = api.gpus()
    _print_json([dataclasses.asdict(row) for row in rows]) if as_json else print(gpus_text(rows))


@app.command()
def models(as_json: JsonOption = False) -> None:
    """The models that are known by name: a forecast of one needs no network."""
    from memfit import api
    from memfit.monitor.catalog_text import models_text

    rows = api.models()
    _print_json([vars(row) for row in rows]) if as_json else print(models_text(rows))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; MemfitError becomes its message and its code."""
    if arguments is None and sys.argv[1:2] == ["estimate"]:
        one_answer()
    try:
        result = app(arguments, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except MemfitError as error:
        print(f"memfit: {error}", file=sys.stderr)
        return error.exit_code
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("memfit: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "show"):
            error.show()
            return getattr(error, "exit_code", 2)
        raise


def _counter() -> Any:
    from memfit.monitor.waiting import Counter

    return Counter(_say)


def _say(text: str) -> None:
    for line in text.splitlines():
        print(f"  {line}", file=sys.stderr, flush=True)


def _sets(given: list[str] | None, gpus: str | None = None, host_memory: str | None = None) -> list[str]:
    sets = list(given or ())
    if gpus is not None:
        sets.append(f"hardware.gpus={gpus}")
    if host_memory is not None:
        sets.append(f"hardware.host_memory={host_memory}")
    return sets


def _run_names(recipes: list[Path | None], models: list[str]) -> tuple[str, ...]:
    """What the runs are called: their files without what their paths share, or the model."""
    if any(path is None for path in recipes):
        return tuple(models)
    paths = [path for path in recipes if path is not None]
    return tuple(path.stem if len({p.stem for p in paths}) == len(paths) else str(path) for path in paths)


def _tracing(what: object, as_json: bool) -> contextlib.AbstractContextManager[None]:
    """A line on a terminal while a step is traced; --json is for programs, which need none."""
    from memfit.monitor.waiting import waiting

    return contextlib.nullcontext() if as_json else waiting(sys.stderr, f"tracing one training step of {what}")


def _print_difference(found: Any, as_json: bool) -> None:
    from memfit.planner.difference_text import difference_text

    if as_json:
        _print_json(found.to_json())
    else:
        print(difference_text(found))


def _show_proof(path: Path, as_json: bool) -> None:
    from memfit.inputs.run_folder import read_json
    from memfit.monitor.proof_card import card

    proof = read_json(path)
    _print_json(proof) if as_json else print(card(proof))


def _whole_command() -> str:
    import shlex

    return shlex.join(["memfit", *(argument for argument in sys.argv[1:] if argument != "--pilot")])


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
