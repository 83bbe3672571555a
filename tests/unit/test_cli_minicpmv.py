"""A MiniCPM-V 2.6 checkpoint through the command line, as a user meets it: check, estimate, train, eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from memfit.cli import main
from memfit.testing import make_samples

RECIPE = """
model: {model}
data: {{train: {data}, eval: 0.3}}
method: lora
lora: {{rank: 4, alpha: 8}}
levers: {{micro_batch: 2}}
batch: 2
schedule: {{steps: 2, learning_rate: 1.0e-3}}
generate: {{max_new_tokens: 4}}
hardware: {{gpus: 1xcpu}}
run: {{folder: {run}}}
"""


@pytest.fixture
def recipe(dummies: Callable[[str], Path], tmp_path: Path) -> Path:
    """A recipe file on a tiny MiniCPM-V 2.6; its conversations have a second question where they can be shortened."""
    data = make_samples(tmp_path / "data", 10)
    rows = json.loads(data.read_text())
    for row in rows[:5]:
        row["conversations"] += [
            {"role": "user", "content": "And how many of them stand in the middle?"},
            {"role": "assistant", "content": "None of them does."},
        ]
    data.write_text(json.dumps(rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=dummies("minicpmv2_6"), data=data, run=tmp_path / "run"))
    return path


def said(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capfd.readouterr()  # what making models and data printed
    code = main([str(word) for word in words])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_the_whole_way(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capfd, "check", recipe)
    assert (code, out.splitlines()[0]) == (0, "data: ok")
    code, out, _ = said(capfd, "estimate", recipe, "--json")
    assert code == 0
    estimated = json.loads(out)
    assert set(estimated["parameters"]) == {"vision", "connector", "language", "head"}
    assert {part for part, counts in estimated["parameters"].items() if counts["trainable"]} == {"language"}

    # In a process of its own: libraries must not write on stdout, which is for programs, nor warn on stderr.
    run = subprocess.run(
        [sys.executable, "-m", "memfit", "train", str(recipe), "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"},
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["steps"] == 2
    assert "step 2/2" in run.stderr
    assert not [line for line in run.stderr.splitlines() if "warning" in line.lower() or not line.startswith("  ")]

    code, out, err = said(capfd, "eval", tmp_path / "run", "--base")
    assert code == 0, err
    assert out.startswith("base: field F1")
    code, out, err = said(capfd, "eval", tmp_path / "run", "--json", "--limit", 2)
    assert json.loads(out), err
    assert {path.name for path in (tmp_path / "run" / "model").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "preprocessor_config.json",
    }


def test_max_length_by_a_users_eyes(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    limit = ["--set", "max_length=140"]
    code, out, _ = said(capfd, "check", recipe, *limit)
    assert code == 0, out
    assert out.splitlines()[0] == "data: usable, 5 samples shortened to max_length"
    assert "max_length 140 shortens 5 of 10 samples: 10 whole turns (" in out
    code, out, err = said(capfd, "estimate", recipe, *limit)
    assert code == 0
    assert "max_length 140 shortens 5 of 10 samples" in err
    code, out, err = said(capfd, "train", recipe, "--set", "max_length=100")
    assert code == 1
    problem, hint = err.strip().split("\n\nhint: ")
    assert "rows" in problem
    assert "too-long" in problem
    assert hint.startswith("max_length: auto takes every sample whole")
    assert not (tmp_path / "run").exists()


def test_flash_without_a_gpu_or_package_is_one_line(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capfd, "train", recipe, "--set", "levers.attention=flash")
    assert (code, out) == (1, "")
    assert err.strip().endswith("hint: levers.attention: sdpa")
    assert "Traceback" not in err


def test_a_checkpoint_that_does_not_match_is_told_by_train(
    recipe: Path, dummies: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = shutil.copytree(dummies("minicpmv2_6"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "drop_vision_last_layer": True}))
    code, out, err = said(capfd, "train", recipe, "--set", f"model={folder}")
    assert (code, out) == (1, "")
    assert "16 tensors do not match config.json" in err
    assert "and 4 more" in err
    assert err.strip().splitlines()[-1].startswith("hint: config.json: drop_vision_last_layer: false")
