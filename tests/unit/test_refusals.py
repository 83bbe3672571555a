"""What a user gets wrong, through the command line: one line with the numbers, a blank line, a hint; all at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from memfit.cli import main

GPU, NODE = "hardware.gpus=1xA100-40G", "hardware.gpus=2xA100-40G"
# (kind of model, settings, words of the problem, words of the hint)
REFUSED: list[tuple[str, tuple[str, ...], str, str]] = [
    ("llama", (GPU, "levers.linear_attention=fla"), "a llama model has no linear-attention layers", "reference"),
    ("llama", (GPU, "workload.images=2"), "workload.images: 2, but a llama model takes no pictures", "leave out"),
    ("llama", (GPU, "levers.attention=flash", "levers.precision=fp32"), "16 bit only", "levers.attention: sdpa"),
    ("llama", (GPU, "levers.offload_to=nvme"), "offload_to: nvme, but levers.offload is none", "parallel: zero3"),
    ("llama", (GPU, "levers.offload=optimizer"), "does not run with parallel: none", "zero1, zero2 or zero3"),
    ("llama", (GPU, "levers.activation_offload=true", "levers.checkpointing=none"), "checkpointing is none", "full"),
    ("llama", (GPU, "lora.init=nonsense", "method=lora"), "lora.init: 'nonsense'", "docs/recipe.md"),
    (
        "llama",
        (GPU, "schedule.learning_rate={vision: 1e-4, language: 1e-4, head: 1e-4}"),
        "no vision part",
        "leave out",
    ),
    ("llama", (GPU, "schedule.learning_rate={language: 1e-4}"), "names no rate for head, which learns", "parts.head"),
    ("llama", (GPU, "levers.optimizer=adamv"), "levers.optimizer 'adamv' is unknown", "did you mean adamw?"),
    ("llama", (GPU, "model_config.num_attention_heads=7"), "is not a multiple of the number of attention", "mend"),
    ("llama", (NODE, "batch=7"), "batch 7 is not a multiple of 2 GPUs x micro_batch 1 = 2", "batch: 6 or 8"),
    ("llama", ("hardware.gpus=1xV100-32G", "levers.precision=bf16-amp"), "needs bf16, which V100-32G", "fp16-amp"),
    ("llama", ("hardware.gpus=2xT4", "levers.precision=bf16-mixed", "levers.parallel=zero3"), "T4", "fp16-mixed"),
    ("llama", ("hardware.gpus=2xcpu", "levers.precision=fp16-amp", "levers.parallel=zero1"), "zero1", "fp16-mixed"),
    ("minicpmv4_6", (GPU, "levers.packing=true"), "linear-attention layers carry one sample's state", "packing: false"),
    ("qwen2_5_vl", (GPU, "levers.packing=true"), "positions from all pictures of a row", "packing: false"),
    ("llava", (GPU, "workload.tokens=5"), "workload.tokens: 5, but its pictures alone take", "workload.tokens: "),
]


@pytest.mark.parametrize(("kind", "sets", "problem", "hint"), REFUSED, ids=lambda value: str(value)[:40])
def test_one_line_and_a_hint(
    dummies: Callable[[str], Path],
    capfd: pytest.CaptureFixture[str],
    kind: str,
    sets: tuple[str, ...],
    problem: str,
    hint: str,
) -> None:
    options = [word for text in sets for word in ("--set", text)]
    assert main(["estimate", "--model", str(dummies(kind)), *options]) == 1
    captured = capfd.readouterr()
    said = captured.err[captured.err.index("memfit: ") :]
    lines = said.rstrip("\n").split("\n")
    assert problem in lines[0]
    assert lines[1] == ""
    assert lines[2].startswith("hint: ")
    assert hint in lines[2]
    assert len(lines) == 3


def test_all_at_once(dummies: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(
        f"model: {dummies('llama')}\nhardware: {{gpus: 2xV100-32G}}\nbatch: 7\nparts: {{audio: full}}\n"
        "levers: {precision: pure-bf16, attention: flash, offload: optimizer, linear_attention: fla,\n"
        "  activation_offload: true, checkpointing: none}\nworkload: {images: 1}\n"
    )
    assert main(["estimate", str(recipe)]) == 1
    said = capfd.readouterr().err
    wanted = (
        "needs bf16",
        "flash needs",
        "batch 7",
        "parts.audio",
        "levers.offload: optimizer",
        "fla, but",
        "images: 1",
    )
    for words in (*wanted, "activation_offload"):
        assert words in said
    assert "8 settings do not go together" in said
    assert "hint: mend all 8" in said


def test_a_wrong_recipe_tells_every_mistake(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("modle: x\nmodel: m\nlevers: {precison: fp32, micro_batch: 0}\nbatch: -3\nlora: {init: no}\n")
    assert main(["estimate", str(recipe)]) == 1
    said = capfd.readouterr().err
    for words in ("did you mean model?", "did you mean levers.precision?", "micro_batch: 0", "batch: -3", "lora.init"):
        assert words in said


def test_names_that_are_nearly_right(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("minicmp-v-4.6", "did you mean minicpm-v-4.6"),
        ("lama-3.2-1b", "did you mean llama-3.2-1b"),
        (str(tmp_path / "empty"), "holds no config.json"),
        (str(tmp_path / "none"), "no model at"),
    ):
        assert main(["estimate", "--model", name, "--gpus", "1xT4"]) == 1
        said = capfd.readouterr().err
        assert words in said
        assert "\n\nhint: " in said
