"""`memfit estimate` as a user meets it: two recipes, pictures, names of the catalogue, and refusals in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.unit.conftest import Command


@pytest.fixture
def recipes(dummies: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path]:
    """A full fine-tune and LoRA of the same tiny model on the same card."""
    found = []
    for method in ("full", "lora"):
        path = tmp_path / f"{method}.yaml"
        path.write_text(
            f"model: {dummies('llama')}\nmethod: {method}\nworkload: {{tokens: 64}}\n"
            "lora: {rank: 4}\nhardware: {gpus: 1xRTX4090}\n"
        )
        found.append(path)
    return found[0], found[1]


def test_two_recipes(run: Command, recipes: tuple[Path, Path]) -> None:
    code, out, _ = run("estimate", *recipes)
    assert code == 0
    assert out.startswith("A full: fits")
    assert "\nB lora: fits" in out
    assert "only B" in out
    assert "B - A" in out
    code, out, _ = run("estimate", *recipes, "--json")
    data = json.loads(out)
    whole = [json.loads(run("estimate", recipe, "--json")[1]) for recipe in recipes]
    for side, one in zip(("first", "second"), whole, strict=True):
        assert data[side]["process"] == one["gpu"]["process_bytes"]
        assert data[side]["phases"] == one["gpu"]["phases"]
    # The difference of every phase is that of the two forecasts.
    for phase, change in data["phases"].items():
        sizes = [one["gpu"]["phases"][phase] for one in whole]
        assert change == (None if None in sizes else sizes[1] - sizes[0])
    ids = {row["id"] for row in (*data["terms"], *data["equal"]["terms"])}
    assert ids >= {term["id"] for one in whole for term in one["gpu"]["terms"]}


def test_settings_act_on_both(run: Command, recipes: tuple[Path, Path]) -> None:
    code, out, _ = run("estimate", *recipes, "--set", "method=full")
    assert code == 0
    assert "every term is the same" in out


def test_exit_code_three_when_one_does_not_fit(run: Command, recipes: tuple[Path, Path], tmp_path: Path) -> None:
    huge = tmp_path / "huge.yaml"
    huge.write_text("model: llama-3.1-8b\nmethod: full\nworkload: {tokens: 64}\nhardware: {gpus: 1xRTX4090}\n")
    code, out, _ = run("estimate", recipes[0], huge)
    assert code == 3
    assert "does not fit" in out


def test_why_of_both(run: Command, recipes: tuple[Path, Path]) -> None:
    code, out, _ = run("estimate", *recipes, "--why", "weights.language")
    assert code == 0
    assert out.count("formula:") == 2


@pytest.mark.parametrize("suffix", ["svg", "png", "html"])
def test_pictures(run: Command, recipes: tuple[Path, Path], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    code, out, err = run("estimate", *recipes, "--plot", path)
    assert code == 0
    assert f"picture: {path}" in err
    assert "B - A" in out
    if suffix == "png":
        with Image.open(path) as image:
            assert image.height > 2000
    else:
        text = path.read_text(encoding="utf-8")
        for phase in ("load", "forward", "loss", "backward", "step"):
            assert f">{phase}</text>" in text
        assert "operators in their order" in text


def test_the_course_of_a_step_is_kept_in_the_cache(run: Command, recipes: tuple[Path, Path], tmp_path: Path) -> None:
    """The second picture comes from the cached trace and is the same."""
    paths = [tmp_path / f"{name}.svg" for name in ("one", "two")]
    for path in paths:
        assert run("estimate", recipes[1], "--plot", path)[0] == 0
    assert paths[0].read_text() == paths[1].read_text()


def test_refusals_are_one_line_and_a_hint(run: Command, recipes: tuple[Path, Path], tmp_path: Path) -> None:
    for arguments, text, hint in (
        ((recipes[0], "--plot", tmp_path / "x.pdf"), "no picture is written as .pdf", "x.svg"),
        (("--model", "meta-llama/Llama-3.1-8BB", "--gpus", "1xT4"), "Llama-3.1-8BB", "llama-3.1-8b"),
        ((tmp_path / "none.yaml",), "none.yaml", ""),
        (("--model", tmp_path, "--gpus", "1xT4"), "holds no config.json", ""),
        (("--model", "llama-3.2-1b", "--gpus", "1xT4", "--set", "parts.vision=frozen"), "vision", ""),
        (("--model", "llama-3.2-1b", "--gpus", "1xRTX9090"), "RTX9090", ""),
        (("--model", "minicpm-v-4.6", "--gpus", "1xT4", "--set", "workload.tokens=20"), "workload.tokens", ""),
    ):
        code, out, err = run("estimate", *arguments)
        assert code == 1, (arguments, err)
        assert out == ""
        assert text in err
        assert f"hint: {hint}" in err if not hint else hint in err.partition("hint: ")[2]
        assert "Traceback" not in err


def test_models_lists_the_catalogue(run: Command) -> None:
    code, out, _ = run("models")
    assert code == 0
    for text in ("openbmb/MiniCPM-V-2_6", "qwen2.5-vl-7b", "8.03 B", "cited"):
        assert text in out
    code, out, _ = run("models", "--json")
    rows = json.loads(out)
    assert all(row["source"] and row["config"]["model_type"] for row in rows)


def test_speech_and_audio_of_an_o_model_stay_on_disk(run: Command) -> None:
    """What memfit loads of o 2.6 to train it: vision, resampler and language, 16.2 of the 17.3 GB."""
    found = run("estimate", "--model", "openbmb/MiniCPM-o-2_6", "--gpus", "1xH100", "--set", "method=lora", "--json")
    data = json.loads(found[1])
    assert set(data["parameters"]) == {"vision", "connector", "language", "head"}
    weights = sum(term["bytes"] for term in data["gpu"]["terms"] if term["id"].startswith("weights."))
    assert weights == 2 * 8_099_418_864
