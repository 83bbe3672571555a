"""Tiny models and data, made once a session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from memfit.cli import main
from memfit.inputs.recipe_file import load_recipe
from memfit.specs.recipe import Recipe
from memfit.testing import make_dummy, make_samples
from tests.supported import READING

Command = Callable[..., tuple[int, str, str]]
VISION_KINDS = ("minicpmv4_6", "minicpmv4_7", "qwen2_5_vl", "llava", "minicpmv2_6")


@pytest.fixture(scope="session")
def dummies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`dummies("llava")` is the folder of a tiny random model of that kind."""
    root = tmp_path_factory.mktemp("dummies")

    def folder(kind: str) -> Path:
        path = root / kind
        return path if path.is_dir() else make_dummy(kind, path)

    return folder


@pytest.fixture(scope="session")
def slips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data.json of 12 samples with one picture each."""
    return make_samples(tmp_path_factory.mktemp("samples"), 12)


@pytest.fixture(scope="session")
def words(slips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same samples without their pictures, for models that take none."""
    rows = json.loads(slips.read_text(encoding="utf-8"))
    for row in rows:
        del row["image"]
        row["conversations"][0]["content"] = f"What of number {row['id']}?"
    path = tmp_path_factory.mktemp("words") / "data.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def recipe(dummies: Callable[[str], Path], slips: Path, words: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`recipe("llava", "method=lora")`: a recipe on a tiny model, on the CPU, quick."""

    def make(kind: str, *sets: str) -> Recipe:
        quick = (
            f"data.train={words if kind in READING else slips}",
            "data.eval=0",
            "hardware.gpus=1xcpu",
            "levers.precision=fp32",
            "levers.checkpointing=none",
            "levers.micro_batch=2",
            "levers.loss=full-logits",  # so that nothing is left to search: training takes one trace
            "batch=4",
            "schedule.steps=2",
            "schedule.learning_rate=1e-3",
            "lora.rank=4",
            "lora.dropout=0",
            "generate.max_new_tokens=8",
            f"run.folder={tmp_path / 'run'}",
        )
        return load_recipe(None, [*quick, *sets], model=str(dummies(kind)))

    return make


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a memfit command in this process: its exit code, stdout and stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()  # what fixtures printed (DeepSpeed's first import warns on stdout) is not the command's
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return command
