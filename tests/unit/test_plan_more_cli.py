"""`memfit plan` beyond the choice: sweeps, pictures, questions, goal long, "why not?", and what train makes of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import memfit
from memfit.errors import DoesNotFit
from memfit.specs.recipe import Recipe
from memfit.units import GIB
from tests.unit.conftest import Command

PINNED = (
    "{parallel: none, precision: pure-bf16, optimizer: adamw, loss: full-logits, checkpointing: none, "
    "activation_offload: false, allocator: default, micro_batch: 1}"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def pinned(dummies: Callable[[str], Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model on one card with nothing left to choose, so that a plan takes one trace."""
    monkeypatch.setenv("MEMFIT_CACHE", str(cache))
    path = tmp_path / "pinned.yaml"
    path.write_text(
        f"model: {dummies('llama')}\nworkload: {{tokens: 64}}\nbatch: 2\nlevers: {PINNED}\n"
        "hardware: {gpus: 1xRTX4090}\n"
    )
    return path


def test_a_sweep_is_what_estimate_says_at_each_value(run: Command, pinned: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "plan.json", "--brief")
    code, text, progress = run("plan", pinned, *out, "--sweep", "workload.tokens=64,128", "--json")
    assert code == 0
    assert "workload.tokens 128 (2 of 2)" in progress
    found = json.loads(text)
    assert {"chosen", "ranked", "refused", "nearest", "searched", "seconds"} <= set(found)
    rows = found["sweep"]
    assert [row["value"] for row in rows] == [64, 128]
    assert rows[1]["bytes"] > rows[0]["bytes"]
    for row in rows:
        assert sum(row["pieces"].values()) == row["bytes"]
        alone = json.loads(run("estimate", pinned, "--set", f"workload.tokens={row['value']}", "--json")[1])
        assert row["bytes"] == alone["gpu"]["process_bytes"]
        assert row["host_bytes"] == alone["host"]["peak_bytes"]


def test_an_impossible_value_is_a_row_with_its_reason(run: Command, pinned: Path, tmp_path: Path) -> None:
    picture = tmp_path / "sweep.svg"
    options = ("--out", tmp_path / "plan.json", "--brief", "--plot", picture)
    code, text, _ = run("plan", pinned, *options, "--sweep", "levers.micro_batch=1..3")
    assert code == 0
    assert "  3: batch 2 is not a multiple of 1 GPUs x micro_batch 3 = 3" in text
    assert "impossible" in text
    root = ElementTree.fromstring(picture.read_text())
    words = [node.text for node in root.iter() if node.text]
    assert "chosen" in words
    assert any("over levers.micro_batch" in word for word in words)


WRONG = [
    ("workload.tokns=1..4", "unknown key", "did you mean workload.tokens?"),
    ("workload.tokens=", "has no KEY=a..b form", "for example"),
    ("workload.tokens", "has no KEY=a..b form", "for example"),
    ("workload.tokens=..", "nothing is no number", "for example"),
    ("workload.tokens=few..many", "'few' is no number", "for example"),
    ("workload.tokens=9..1", "9..1 runs backwards", "1..9"),
    ("workload.tokens=1..9..0", "a step of 0", "above 0"),
    ("workload.tokens=1..100000..1", "has 100,000 values", "a step of 1588 or more"),
    ("levers.parallel=1..4", "takes no numbers", "levers.parallel=a,b,c"),
    ("levers=1..4", "is a section", "levers.precision"),
    ("levers.precision=one,two", "none of 2 values is possible", "docs/recipe.md"),
]


@pytest.mark.parametrize(("said", "problem", "hint"), WRONG, ids=[row[0] for row in WRONG])
def test_a_wrong_sweep_is_one_line_and_a_hint(
    run: Command, pinned: Path, tmp_path: Path, said: str, problem: str, hint: str
) -> None:
    code, text, error = run("plan", pinned, "--brief", "--out", tmp_path / "plan.json", "--sweep", said)
    lines = error[error.index("memfit: ") :].rstrip("\n").split("\n")
    assert (code, text, len(lines)) == (1, "", 3)
    assert problem in lines[0]
    assert hint in lines[2]


def test_why_not_is_answered_from_the_file(run: Command, pinned: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    levers = ("levers.micro_batch=auto", "levers.checkpointing=auto")
    sets = [piece for text in levers for piece in ("--set", text)]
    run("plan", pinned, "--brief", "--out", out, *sets)
    chosen = json.loads(out.read_text())["chosen"]["recipe"]["levers"]
    assert (chosen["micro_batch"], chosen["checkpointing"]) == (2, "none")
    before = out.read_bytes()
    code, text, _ = run("plan", out, "--why-not", "levers.checkpointing=full")
    assert code == 0
    assert "times as long as the chosen" in text
    assert "is what was chosen" in run("plan", out, "--why-not", "levers.micro_batch=2")[1]
    assert "no combination has it" in run("plan", out, "--why-not", "levers.micro_batch=7")[1]
    code, _, error = run("plan", out, "--why-not", "levers.attention=eager")
    assert (code, "levers.attention was not searched; it stayed sdpa" in error) == (1, True)
    assert out.read_bytes() == before, "no search, nothing written"


def test_what_is_refused_says_by_how_much(run: Command, pinned: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    run("plan", pinned, "--brief", "--out", out, "--gpus", "1xcpu", "--host-memory", "400MiB")
    short = json.loads(out.read_text())["refused"][0]["short_by_bytes"]
    code, text, _ = run("plan", out, "--why-not", "levers.checkpointing=none", "--json")
    assert code == 0
    assert f"{short / 2**20:.2f} MiB more in host memory" in " ".join(json.loads(text)["why_not"])


def test_questions_are_answered(run: Command, pinned: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    free = ("--set", "levers.parallel=auto", "--set", "levers.offload=none")
    code, text, _ = run("plan", pinned, "--out", out, *free)
    assert code == 0
    found = {one["question"]: one for one in json.loads(out.read_text())["answers"]}
    assert all(f"{one['question']} {one['answer']}" in text for one in found.values())
    assert found["how long may my samples be?"]["value"] == 4096, "the dummy's whole context"
    assert "samples a second" in found["what does one more GPU buy?"]["answer"]
    assert "1x" in found["what is the smallest hardware for this recipe?"]["answer"]


@pytest.mark.long
def test_goal_long_finds_the_longest_that_fits(run: Command, pinned: Path, tmp_path: Path) -> None:
    """One unit more does not fit, and what was found is a plan with goal fast that fits."""
    out = tmp_path / "plan.json"
    need = json.loads(run("estimate", pinned, "--gpus", "1xcpu", "--set", "workload.tokens=640", "--json")[1])
    memory = f"hardware.host_memory={need['host']['peak_bytes'] + 1000}"
    options = ("--gpus", "1xcpu", "--brief", "--out", out, "--set", memory, "--set", "goal=long")
    code, text, _ = run("plan", pinned, *options)
    assert code == 0
    recipe = json.loads(out.read_text())["chosen"]["recipe"]
    assert (recipe["max_length"], recipe["goal"]) == (640, "fast")
    assert "goal long: max_length 640 is the most that fits in tier 1" in text
    code, _, _ = run("estimate", out, "--set", "max_length=704", "--set", "workload.tokens=704")
    assert code == 3


def test_train_runs_what_plan_chooses(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMFIT_CACHE", str(tmp_path / "cache"))
    sets = (
        "batch=2",
        "schedule.steps=1",
        "levers.micro_batch=auto",
        "levers.loss=auto",
        f"run.folder={tmp_path / 'run'}",
    )
    wanted = recipe("llama", *sets)
    said: list[str] = []
    done = memfit.train(wanted, say=said.append)
    made: dict[str, Any] = json.loads((done.folder / "plan.json").read_text())
    plan = memfit.plan(wanted).chosen
    assert plan is not None
    levers = plan.recipe.levers
    assert (made["recipe"]["levers"]["micro_batch"], made["recipe"]["levers"]["loss"]) == (2, levers.loss)
    assert levers.micro_batch == 2
    assert made["reasons"] == list(plan.reasons)
    assert made["candidates"]["rows"]
    assert any(text.startswith("plan: full, none, fp32") for text in said)
    answer = memfit.why_not(done.folder / "plan.json", ["levers.micro_batch=1"])
    assert answer[0].startswith("why not levers.micro_batch=1")
    keys = dataclasses.replace(wanted.hardware, host_memory=GIB // 4)  # type: ignore[type-var]
    with pytest.raises(DoesNotFit, match="nothing that may be chosen fits"):
        memfit.train(dataclasses.replace(wanted, hardware=keys), say=said.append)
