"""Train one recipe under several layouts and read back what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from memfit.build.build import Materials
from memfit.engine.launch import start
from memfit.engine.train import Job, train
from memfit.inputs.data import load_samples
from memfit.inputs.data.options import check_options
from memfit.inputs.encode import Encoder
from memfit.inputs.model_source import require_weights
from memfit.inputs.recipe_file import load_recipe
from memfit.inputs.run_folder import RunFolder, write_json
from memfit.planner.plan import plan_json
from memfit.trace.prepare import prepare

SCRIPT = Path(__file__).parent / "cases.py"
LOSS, GRADIENT, WEIGHT = 1e-5, 1e-4, 1e-4  # the largest relative difference of a step, a step, a saved tensor


@dataclass(frozen=True)
class Case:
    """One run: a name, what is set beside the common recipe, and an error planted in it."""

    name: str
    sets: tuple[str, ...]
    fault: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run logged at each step, and what it saved."""

    folder: Path
    loss: tuple[float, ...]
    gradient_norm: tuple[float, ...]
    tokens: tuple[int, ...]
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Common:
    """The recipe that all cases share."""

    model: Path
    data: Path
    sets: tuple[str, ...]


@dataclass(frozen=True)
class Gaps:
    """How far a run is from the one-process run: the worst step's loss and gradient norm, the worst saved tensor."""

    group: str
    case: str
    loss: float
    gradient: float
    weight: float


FOUND: list[Gaps] = []  # of all comparisons of this session, for `tests.invariant.matrix`


def follows(group: str, case: str, alone: Outcome, found: Outcome) -> None:
    """Assert that a run saw the tokens of the one-process run, and learned the same."""
    assert found.tokens == alone.tokens, case
    weight, tensor = worst_weight(alone, found)
    gaps = Gaps(group, case, worst_loss(alone, found), worst_gradient(alone, found), weight)
    FOUND.append(gaps)
    assert gaps.loss <= LOSS, case
    assert gaps.gradient <= GRADIENT, case
    assert gaps.weight <= WEIGHT, f"{case}: {tensor} differs by {weight:.2e}"


def run_alone(common: Common, case: Case, root: Path) -> Outcome:
    """A run in this process."""
    train(_job(common, case, root))
    return outcome(root / case.name)


def run_in_ranks(wanted: Sequence[tuple[Common, Sequence[Case]]], root: Path, ranks: int) -> list[dict[str, Outcome]]:
    """All cases of all recipes in one group of processes; for each recipe the outcomes by name."""
    rows = []
    for number, (common, cases) in enumerate(wanted):
        for case in cases:
            _job(common, case, root / str(number))
            rows.append({"folder": str(root / str(number) / case.name), "fault": case.fault})
    file = root / "cases.json"
    file.write_text(json.dumps(rows))
    start([str(SCRIPT), str(file)], ranks, root / "logs")
    return [
        {case.name: outcome(root / str(number) / case.name) for case in cases}
        for number, (_, cases) in enumerate(wanted)
    ]


def _job(common: Common, case: Case, root: Path) -> Job:
    """The job of a case, its run folder written."""
    recipe = load_recipe(None, [f"data.train={common.data}", *common.sets, *case.sets], model=str(common.model))
    prepared = prepare(recipe)
    plan, source = prepared.plan(), require_weights(prepared.source)
    loaded = load_samples(recipe.data, check_options(recipe), Encoder(source, recipe.image))
    folder = RunFolder(root / case.name)
    folder.path.mkdir(parents=True)
    write_json(folder.plan, plan_json(plan))
    write_json(folder.data, {"split": loaded.split.to_json()})
    return Job(plan, Materials(source, prepared.family, prepared.profile), loaded.train, loaded.eval, folder)


def outcome(folder: Path) -> Outcome:
    """Read a run folder."""
    rows = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    weights: dict[str, torch.Tensor] = {}
    for file in sorted((folder / "model").glob("*.safetensors")):
        weights |= load_file(file)
    return Outcome(
        folder=folder,
        loss=tuple(row["loss"] for row in steps),
        gradient_norm=tuple(row["grad_norm"] for row in steps),
        tokens=tuple(row["tokens"] for row in steps),
        weights=weights,
    )


def live_states(folder: Path) -> dict[str, int]:
    """What all ranks held together (see `live.Watch`); gradients only where they were still there to be counted."""
    ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("live.*.json"))]
    return {kind: sum(rank[kind] for rank in ranks) for kind, value in ranks[0].items() if value is not None}


def forecast_states(folder: Path) -> dict[str, int]:
    """The ledger's states of a node of CPU ranks, summed over parts: weights, gradients, master, optimizer; and
    partitions, the buffer that ZeRO-3 keeps beside gradients that are offloaded."""
    forecast = json.loads((folder / "plan.json").read_text())["forecast"]
    sums: dict[str, int] = {}
    for term in forecast["host"]["terms"]:
        kind = term["id"].removeprefix("adapter.").split(".")[0]
        kind = "partitions" if term["id"].endswith(".gradients.partitions") else kind
        sums[kind] = sums.get(kind, 0) + term["bytes"]
    return sums


def worst_loss(one: Outcome, other: Outcome) -> float:
    """The largest relative difference of the losses of a step."""
    return max(abs(a - b) / abs(a) for a, b in zip(one.loss, other.loss, strict=True))


def worst_gradient(one: Outcome, other: Outcome) -> float:
    """The largest relative difference of the gradients' norms of a step."""
    return max(abs(a - b) / abs(a) for a, b in zip(one.gradient_norm, other.gradient_norm, strict=True))


def worst_weight(one: Outcome, other: Outcome) -> tuple[float, str]:
    """The largest relative difference of a saved tensor (in the 2-norm), and its name.

    Biases of attention's keys are left out (of a packed bias of queries, keys and values the middle third): softmax
    cancels what is added to all keys alike, so that their gradient is zero but for rounding, which Adam blows up to
    whole steps.
    """
    assert one.weights.keys() == other.weights.keys()
    found = []
    for name, value in one.weights.items():
        if name.endswith("k_proj.bias"):
            continue
        found_there = other.weights[name]
        if name.endswith("in_proj_bias"):
            value, found_there = (torch.cat(bias.chunk(3)[::2]) for bias in (value, found_there))
        gap = torch.linalg.vector_norm(value.double() - found_there.double())
        found.append((float(gap / (torch.linalg.vector_norm(value.double()) + 1e-12)), name))
    return max(found)
