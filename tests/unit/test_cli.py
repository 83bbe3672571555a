"""The command line as a user meets it: exit codes, one line and a hint, data on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from memfit.cli import main
from memfit.testing import make_samples


@dataclass(frozen=True)
class Said:
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def command(*arguments: object) -> Said:
        capfd.readouterr()  # what making models and data printed, libraries' remarks included
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Said(code, captured.out, captured.err)

    return command


@pytest.fixture
def quick(dummies: Callable[[str], Path], tmp_path: Path) -> list[str]:
    """A model, data of its own in tmp_path, and settings for a training run of a second."""
    data = make_samples(tmp_path / "data", 10)
    sets = {
        "data.train": data,
        "data.eval": 0.3,
        "hardware.gpus": "1xcpu",
        "levers.precision": "fp32",
        "levers.micro_batch": 2,
        "batch": 2,
        "schedule.steps": 2,
        "generate.max_new_tokens": 4,
        "run.folder": tmp_path / "run",
    }
    return ["--model", str(dummies("minicpmv4_6")), *(x for k, v in sets.items() for x in ("--set", f"{k}={v}"))]


def one_line_and_a_hint(said: Said, text: str) -> None:
    problem, blank, hint = said.err.strip().rsplit("\n", 2)[-3:]
    assert said.code == 1, said
    assert text in problem or text in said.err, said.err
    assert blank == ""
    assert hint.startswith("hint: ")
    assert "Traceback" not in said.err


def test_the_whole_way(run: Callable[..., Said], quick: list[str], tmp_path: Path) -> None:
    checked = run("check", *quick)
    assert checked.code == 0
    assert checked.out.startswith("data: ")
    assert run("estimate", *quick).code == 0
    trained = run("train", *quick, "--json")
    assert trained.code == 0, trained.err
    assert json.loads(trained.out)["steps"] == 2
    assert "step 2/2" in trained.err
    evaluated = run("eval", tmp_path / "run", "--base")
    assert evaluated.code == 0, evaluated.err
    assert evaluated.out.startswith("base: field F1")
    for images in ("shuffled", "blank"):
        assert run("eval", tmp_path / "run", "--images", images).code == 0
    files = {path.name for path in (tmp_path / "run" / "eval").iterdir()}
    assert files == {"base.json", "tuned.json", "comparison.json", "tuned-shuffled.json", "tuned-blank.json"}
    reported = run("report", tmp_path / "run")
    assert reported.code == 0, reported.err
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<svg" in html
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_an_earlier_result_is_kept(run: Callable[..., Said], quick: list[str], tmp_path: Path) -> None:
    assert run("train", *quick).code == 0
    assert run("eval", tmp_path / "run").code == 0
    first = (tmp_path / "run/eval/tuned.json").read_text()
    assert run("eval", tmp_path / "run", "--limit", 1).code == 0
    assert (tmp_path / "run/eval/tuned.1.json.old").read_text() == first


def test_a_model_without_a_run_can_be_evaluated(run: Callable[..., Said], quick: list[str], tmp_path: Path) -> None:
    model, data = quick[1], tmp_path / "data/data.json"
    out = tmp_path / "result.json"
    said = run("eval", model, "--data", data, "--set", "hardware.gpus=1xcpu", "--limit", 2, "--out", out)
    assert said.code == 0, said.err
    assert json.loads(out.read_text())["kind"] == "evaluation"


def test_estimate_prints_one_object(run: Callable[..., Said], dummies: Callable[[str], Path]) -> None:
    said = run("estimate", "--model", dummies("llava"), "--gpus", "2xRTX3090", "--host-memory", "128GiB", "--json")
    value = json.loads(said.out)
    assert (value["schema"], value["verdict"], value["fits"]) == (1, "fits", True)
    assert value["gpu"]["peak_phase"] in value["gpu"]["phases"]
    assert value["interval"]["low_bytes"] < value["gpu"]["process_bytes"] < value["interval"]["high_bytes"]
    assert value["gpu"]["capacity_bytes"] > 23 * 2**30
    assert value["host"]["capacity_bytes"] == 128 * 2**30
    assert value["recipe"]["levers"]["parallel"] == "ddp"
    assert "levers.parallel" in value["defaults"]


def test_what_cannot_fit_exits_3(run: Callable[..., Said], dummies: Callable[[str], Path]) -> None:
    big = ["--set", "model_config.num_hidden_layers=200", "--set", "model_config.hidden_size=4096"]
    said = run("estimate", "--model", dummies("llama"), "--gpus", "1xT4", *big, "--set", "model_config.head_dim=1024")
    assert said.code == 3, said
    assert said.out.startswith("does not fit")


def test_why_explains_a_term_and_names_the_nearest(run: Callable[..., Said], dummies: Callable[[str], Path]) -> None:
    said = run("estimate", "--model", dummies("llava"), "--gpus", "1xA10", "--why", "optimizer.language")
    assert "source" in said.out
    one_line_and_a_hint(run("estimate", "--model", dummies("llava"), "--why", "optimzer.language"), "optimzer.language")


@pytest.mark.parametrize("arguments", [["estimate", "--nonsense"], ["fly"], ["eval"], ["report"]])
def test_a_bad_command_line_exits_2(run: Callable[..., Said], arguments: list[str]) -> None:
    said = run(*arguments)
    assert said.code == 2
    assert said.out == ""


def test_wrong_inputs_are_one_line_and_a_hint(run: Callable[..., Said], quick: list[str], tmp_path: Path) -> None:
    one_line_and_a_hint(run("estimate"), "neither a recipe nor a model")
    one_line_and_a_hint(run("estimate", "--model", tmp_path / "nowhere"), "nowhere")
    one_line_and_a_hint(run("train", *quick, "--set", "levers.precison=fp32"), "levers.precison")
    one_line_and_a_hint(run("train", *quick, "--set", "data.train=nothing.json"), "nothing.json")
    one_line_and_a_hint(run("train", *quick, "--gpus", "1xRTX9999"), "RTX9999")
    one_line_and_a_hint(run("eval", tmp_path), "config.json")
    one_line_and_a_hint(run("report", tmp_path), "plan.json")
    assert not (tmp_path / "run").exists()


def test_broken_pictures_stop_training_and_are_listed(
    run: Callable[..., Said], quick: list[str], tmp_path: Path
) -> None:
    pictures = sorted((tmp_path / "data/images").iterdir())
    pictures[0].unlink()
    pictures[1].write_bytes(pictures[1].read_bytes()[:200])
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    said = run("check", *quick, "--quarantine", tmp_path)
    assert said.code == 1
    assert "missing-image" in said.out
    assert "truncated-image" in said.out
    one_line_and_a_hint(run("train", *quick), "missing-image")
    (quarantined,) = tmp_path.glob("*.jsonl")
    assert len(quarantined.read_text().splitlines()) == 2
    assert run("train", *quick, "--set", "data.max_broken=0.5").code == 0
    assert len(json.loads((tmp_path / "run/data.json").read_text())["broken"]) == 2


def test_a_gpu_that_torch_cannot_use_stops_the_run(
    run: Callable[..., Said], quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This torch has no CUDA: with a driver that reports a GPU, a run on the CPU would be silent."""
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this build of torch has CUDA")
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(
        "#!/bin/sh\n"
        'case "$*" in *query-gpu*) echo "0, NVIDIA GeForce RTX 3090, 24576, 550.54.15, GPU-1, 8.6";;\n'
        '*) echo "| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA Version: 12.4 |";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    automatic = [argument for argument in quick if argument != "hardware.gpus=1xcpu"]
    automatic = [
        a for i, a in enumerate(automatic) if not (a == "--set" and automatic[i + 1 : i + 2] in ([], ["--set"]))
    ]
    said = run("train", *automatic)
    one_line_and_a_hint(said, "550.54.15")
    assert "pip install" in said.err
    assert not (tmp_path / "run").exists()


def test_estimate_of_a_known_model_needs_no_torch(dummies: Callable[[str], Path], tmp_path: Path) -> None:
    """The command itself, with torch and transformers blocked, once the model's parameters are cached."""
    command = ["estimate", "--model", str(dummies("qwen2_5_vl")), "--gpus", "1xRTX3090", "--json"]
    assert main(command) == 0
    blocked = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'transformers', 'peft', 'accelerate'}:\n"
        "            raise ImportError('blocked: ' + name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from memfit.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run([sys.executable, "-c", blocked, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == 1


def test_the_functions_of_the_api_stay_functions() -> None:
    """A submodule of the same name would take a function's place as soon as it is imported."""
    import memfit

    for _ in ("before", "after"):
        for name in memfit.__all__:
            assert name == "__version__" or callable(getattr(memfit, name)), name
        import memfit.api
        import memfit.engine.evaluate
        import memfit.monitor.report
