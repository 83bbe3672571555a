"""The proof: a healthy run is proved and left alone, a run that is not what was asked for does not start."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import memfit
from memfit.build.build import Built, build
from memfit.build.loss import causal_loss
from memfit.engine.worst import StepSampler
from memfit.errors import ProofFailed
from memfit.inputs.recipe_file import override
from memfit.monitor.proof_join import ALIGNMENT
from memfit.planner.worst import worst_batches
from memfit.specs.recipe import Recipe
from memfit.specs.workload import SampleCost
from tests.unit.conftest import Command

Make = Callable[..., Recipe]


def options(recipe: Recipe, *sets: str) -> list[str]:
    """A recipe as words of a command line."""
    plain = json.loads(json.dumps(override(recipe, sets).to_json()))
    return [word for name, value in flat(plain) for word in ("--set", f"{name}={json.dumps(value)}")]


def flat(value: Mapping[str, Any], head: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, item in value.items():
        nested = isinstance(item, dict) and key in ("levers", "data", "schedule", "lora", "run", "hardware", "generate")
        found += flat(item, f"{head}{key}.") if nested else [(f"{head}{key}", item)]
    return found


def proved(recipe: Recipe, **more: Any) -> dict[str, Any]:
    """proof.json of a healthy recipe."""
    result = memfit.train(recipe, proof="only", say=lambda text: None, **more)
    found: dict[str, Any] = json.loads((result.folder / "proof.json").read_text())
    return found


@pytest.mark.prove
@pytest.mark.parametrize("kind", ["llava", pytest.param("minicpmv4_6", marks=pytest.mark.long)])
def test_the_command_shows_a_card_and_leaves_a_proof(recipe: Make, run: Command, tmp_path: Path, kind: str) -> None:
    wanted = recipe(kind, "data.eval=0.25", "parts.vision=frozen")
    code, out, error = run("train", *options(wanted), "--proof", "only")
    assert code == 0, error
    assert out.startswith("proof: ")
    assert "checks hold, peak" in out.splitlines()[0]
    assert "memory by phase" in out
    proof = json.loads((tmp_path / "run/proof.json").read_text())
    assert proof["failed"] == []
    assert {check["lever"] for check in proof["checks"]} >= {"levers.optimizer", "forecast", "save", "reload"}
    assert not (tmp_path / "run/proof").exists()
    assert not (tmp_path / "run/model").exists()
    # The ledger's bytes and those of live tensors, phase by phase: what a CPU rank forecasts is exact.
    for phase in ("forward", "loss", "backward"):
        rows = [row for row in proof["compared"] if row["phase"] == phase and row["name"] != "process"]
        measured, forecast = (sum(row[f"{name}_bytes"] for row in rows) for name in ("measured", "forecast"))
        assert measured == pytest.approx(forecast, abs=ALIGNMENT * len(rows))
    assert len(proof["alive"]) == 20
    assert all(row["term"] for row in proof["alive"])
    assert any(row["module"].endswith(".weight (exp_avg)") for row in proof["alive"])
    assert proof["batches"][0]["reason"] in ("most tokens", "most crops", "largest sum")
    assert "[[" in proof["text"]


@pytest.mark.prove
def test_a_run_after_its_proof_equals_one_without_bit_for_bit(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout draws chance in every step, so that a random state that moved would show."""
    runs = []
    for name in ("proved", "plain"):
        if name == "plain":
            monkeypatch.setattr("memfit.engine.launch.prove_job", lambda *given, **named: {})
        wanted = recipe("llava", "method=lora", "lora.dropout=0.5", "schedule.steps=3", f"run.folder={tmp_path / name}")
        runs.append(memfit.train(wanted, say=lambda text: None).folder)
    assert (runs[0] / "proof.json").exists()
    assert not (runs[1] / "proof.json").exists()
    one, two = (load_file(folder / "model/adapter_model.safetensors") for folder in runs)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    steps = [
        [{**row, "time": 0, "seconds": 0, "wait_seconds": 0, "rss_bytes": 0} for row in rows if row["event"] == "step"]
        for rows in ([json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()] for folder in runs)
    ]
    assert steps[0] == steps[1]


@pytest.mark.prove
def test_a_lever_that_is_not_in_effect_stops_the_run(
    recipe: Make, run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that nobody checkpoints: the lever is named with evidence and fix, and the memory that it costs too."""

    def without(*given: Any) -> Built:
        built = build(*given)
        for module in built.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
        return built

    monkeypatch.setattr("memfit.engine.proof.build", without)
    code, out, error = run("train", *options(recipe("llava", "levers.checkpointing=full")))
    assert code == 4, error
    assert out == ""
    problem, blank, hint = error.strip().splitlines()[-3:]
    assert "proof failed: levers.checkpointing" in problem
    assert blank == ""
    assert hint.startswith("hint: ")
    assert "FAILED levers.checkpointing" in error
    proof = json.loads((tmp_path / "run/proof.json").read_text())
    assert proof["failed"][0].startswith("levers.checkpointing")
    assert "forecast" in proof["failed"]
    (check,) = [check for check in proof["checks"] if check["lever"] == "forecast"]
    assert "activations.backward" in check["evidence"]
    assert not (tmp_path / "run/model").exists()
    assert not (tmp_path / "run/run.jsonl").exists()


@pytest.mark.prove
def test_logits_that_somebody_keeps_are_found(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    def keeping(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        kept.append(outputs.logits)
        return causal_loss(outputs, labels, num_items_in_batch)

    monkeypatch.setattr("memfit.build.loss.causal_loss", keeping)
    with pytest.raises(ProofFailed, match="forecast") as caught:
        memfit.train(recipe("llava"), proof="quick", say=lambda text: None)
    assert caught.value.exit_code == 4
    proof = json.loads((tmp_path / "run/proof.json").read_text())
    vocabulary = kept[0].shape[-1]
    (note,) = [note for note in proof["notes"] if "still alive at its end" in note]
    assert f"{vocabulary})" in note
    assert "lm_head" in note


@pytest.mark.prove
def test_a_pilot_is_proved_without_saving(recipe: Make) -> None:
    wanted = recipe("llava", "method=lora", "schedule.steps=12")
    said: list[str] = []
    result = memfit.train(wanted, pilot=True, say=said.append)
    assert result.steps == 10
    proof = json.loads((result.folder / "proof.json").read_text())
    assert (proof["kind"], proof["failed"]) == ("quick", [])
    assert not {"save", "reload"} & {check["lever"] for check in proof["checks"]}
    assert any(text.startswith("proof: ") for text in said)
    assert (result.folder / "proof.svg").read_text().startswith("<svg")


@pytest.mark.prove
def test_a_loss_that_is_no_number_fails_the_proof(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "memfit.build.loss.causal_loss", lambda out, labels, num_items_in_batch=None: out.logits.sum() * float("nan")
    )
    with pytest.raises(ProofFailed, match="the loss became nan at step 1"):
        memfit.train(recipe("llava"), proof="quick", say=lambda text: None)
    assert json.loads((tmp_path / "run/proof.json").read_text())["failed"] == ["worst batch"]


def cost(tokens: int, patches: int) -> SampleCost:
    return SampleCost(tokens, tokens // 2, 0, patches // 64, patches)


def test_the_batches_that_may_be_the_worst_are_each_there_once() -> None:
    costs = [cost(100, 0), cost(90, 64), cost(10, 640), cost(80, 576), cost(5, 5)]
    assert [(one.reason, one.places) for one in worst_batches(costs, 1)] == [
        ("most tokens", (0,)),
        ("most crops", (2,)),
        ("largest sum", (3,)),
    ]
    assert [one.reason for one in worst_batches(costs[:1], 2)] == ["most tokens"]
    assert worst_batches(costs[:1], 2)[0].places == (0, 0)
    assert worst_batches([], 2) == ()


def test_every_rank_draws_the_same_batch_in_every_step() -> None:
    sampler = StepSampler([(7, 3), (5, 5)], micros=2, ranks=2)
    assert (len(sampler), list(sampler)) == (8, [7, 3] * 4)
    sampler.set_epoch(1)
    assert list(sampler) == [5, 5] * 4


@pytest.mark.long
@pytest.mark.prove
@pytest.mark.parametrize(
    ("layout", "precision"), [("ddp", "fp32"), ("zero2", "bf16-mixed"), ("zero3", "bf16-mixed"), ("fsdp", "fp32")]
)
def test_ranks_are_proved_in_processes_of_their_own(recipe: Make, tmp_path: Path, layout: str, precision: str) -> None:
    sets = ("hardware.gpus=2xcpu", f"levers.parallel={layout}", f"levers.precision={precision}", "data.eval=0.25")
    more = ("engine.zero.reduce_bucket_size=100000",) if layout.startswith("zero") else ()
    proof = proved(recipe("minicpmv4_6", "batch=8", *sets, *more))
    assert proof["failed"] == []
    assert {row["rank"] for row in proof["compared"]} == {0, 1}
    assert proof["peak_measured_bytes"] <= proof["high_bytes"] + ALIGNMENT * len(proof["compared"])
    assert proof["seconds"] < 90
