"""`memfit estimate --why ID`: for every term the printed sum, worked out again, gives the printed bytes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import memfit
from memfit.cli import main
from memfit.planner.activations import peak_of
from memfit.planner.estimate_text import why
from memfit.planner.forecast_json import forecast_json
from memfit.specs.plan import Forecast
from memfit.specs.recipe import Recipe
from memfit.units import gib

Make = Callable[..., Recipe]
COMMON = ("data.train=null", "levers.precision=auto", "levers.checkpointing=auto", "workload.tokens=200", "batch=8")
PICTURE = ("workload.image_size=300x200",)
RTX = "hardware.gpus=1xRTX3090"
OFFLOAD = "levers.offload=params+optimizer"
RECIPES: dict[str, tuple[str, ...]] = {
    "zero3 offload": ("qwen2_5_vl", *PICTURE, "hardware.gpus=2xA100-40G", "levers.parallel=zero3", OFFLOAD),
    "qlora": ("minicpmv4_6", *PICTURE, "hardware.gpus=1xRTX4090", "method=qlora", "loader.workers=2"),
    "fsdp": ("llava", *PICTURE, "hardware.gpus=2xA100-40G", "levers.parallel=fsdp"),
    "cpu ddp": ("llava", *PICTURE, "hardware.gpus=2xcpu", "levers.parallel=ddp"),
    "text": ("llama", RTX, "method=lora", "levers.optimizer=paged-adamw-8bit", "levers.activation_offload=true"),
    "zero1 foreach": ("llama", "hardware.gpus=2xT4", "levers.parallel=zero1", "levers.optimizer=adamw-foreach"),
    "zero2 offload": ("llama", "hardware.gpus=2xRTX3090", "levers.parallel=zero2", "levers.offload=optimizer"),
    "nvme": ("llama", "hardware.gpus=2xRTX3090", "levers.parallel=zero3", OFFLOAD, "levers.offload_to=nvme"),
    "saved modules": (
        "llama",
        RTX,
        "method=lora",
        "levers.optimizer=adamw-8bit",
        "lora.modules_to_save=[embed_tokens]",
    ),
    "adafactor": ("llama", RTX, "levers.optimizer=adafactor"),
}


def value(formula: str) -> int:
    """A formula's sum. Words stand between numbers; after a comma they explain, and `, x N` multiplies all of it."""
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", formula)
    peak = re.fullmatch(r"(\d+) B at the \w+ peak, in .*?(?: x (\d+) ranks)?", text)
    if peak:
        return int(peak[1]) * int(peak[2] or 1)
    text, _, times = text.partition(", x ")
    text = re.sub(r"(\d+) states of (\d+) parameters, (\d+) B each", r"\1 x \2 x \3", text)
    text = re.sub(r"\d+ B, page-locked ", "", text)
    text = re.sub(r"of 4-bit|of \d+( weights)?", "", text)
    if "max(" not in text:
        text = re.sub(r", .*?(?=\) x |$)", "", text)
    text = f"({text})" + (f" x {times}" if times else "")
    text = re.sub(r"\b(?!max\b)[A-Za-z']+", "", text.replace(" x ", " * "))
    assert re.fullmatch(r"(max|[0-9+*(), \-])*", text), f"{formula} -> {text}"
    return int(eval(text, {"__builtins__": {}, "max": max}))


@pytest.mark.parametrize(
    ("formula", "result"),
    [
        ("1,500 elements x 2 B", 3000),
        ("(7 x 2 B - 4 B) x 3 ranks of the node", 30),
        ("2 states of 1,000 parameters, 4 B each + 5 scalars x 4 B, x 2 ranks of the node", 16040),
        ("max(778 B as stored, 1,389 B as trained) x 4 ranks", 5556),
        ("10 blocks of 64 weights x 4 B", 40),
        ("3 elements x 2 B, lm.head", 6),
        ("1,000 B, page-locked 1,024 B, x 2 x 3 ranks", 6144),
    ],
)
def test_the_reader_reads(formula: str, result: int) -> None:
    assert value(formula) == result


def wrong(forecast: Forecast) -> list[str]:
    return [f"{term.id}: {term.formula}" for term in forecast.ledger.terms if value(term.formula) != term.bytes]


@pytest.mark.parametrize("name", RECIPES)
def test_every_term_can_be_worked_out_again(recipe: Make, name: str) -> None:
    kind, *sets = RECIPES[name]
    forecast = memfit.estimate(recipe(kind, *COMMON, *sets))
    assert wrong(forecast) == []
    for term in forecast.ledger.terms:
        text = why(forecast, term.id)
        assert text.startswith(f"{term.id}: {term.name}\n  {gib(term.bytes)} = {term.bytes:,} B\n")
        assert f"formula: {term.formula}" in text
        assert f"source:  {term.source}" in text
        assert min(len(term.formula), len(term.source)) > 2
    # The terms are all there is: of the worst rank on a GPU, of the node in host memory.
    data, peak = forecast_json(forecast), peak_of(forecast)
    assert peak is not None
    gpu, host = data["gpu"], data["host"]
    if gpu is not None:
        alive = [term for term in gpu["terms"] if peak[0] in term["alive"]]
        assert sum(term["bytes"] for term in alive if term["place"] == "gpu") == gpu["peak_allocated_bytes"]
        assert sum(term["bytes"] for term in alive) == gpu["process_bytes"]
    there = [term for term in host["terms"] if host["peak_phase"] in term["alive"]]
    assert sum(term["bytes"] for term in there) == host["peak_bytes"]


def test_a_formula_that_is_off_by_a_tenth_is_seen(recipe: Make) -> None:
    kind, *sets = RECIPES["qlora"]
    forecast = memfit.estimate(recipe(kind, *COMMON, *sets))
    for place, term in enumerate(forecast.ledger.terms):
        if term.bytes < 10:
            continue
        terms = list(forecast.ledger.terms)
        terms[place] = dataclasses.replace(term, bytes=int(1.1 * term.bytes))
        planted = dataclasses.replace(forecast, ledger=dataclasses.replace(forecast.ledger, terms=tuple(terms)))
        assert len(wrong(planted)) == 1


def test_the_command(dummies: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    """Through the command line, term after term; an unknown one names the nearest."""
    words = ["estimate", "--model", str(dummies("llama")), "--gpus", "2xcpu", "--set", "workload.tokens=64"]
    words += ["--host-memory", "64GiB"]
    assert main([*words, "--json"]) == 0
    terms = json.loads(capfd.readouterr().out)["host"]["terms"]
    for term in terms:
        assert main([*words, "--why", term["id"]]) == 0
        out = capfd.readouterr().out
        assert out.splitlines()[0] == f"{term['id']}: {term['name']}"
        assert f"{term['bytes']:,} B" in out
    assert main([*words, "--why", "weights.langauge"]) == 1
    assert "hint: did you mean weights.language" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["demo", "cpu-ddp", "minicpm-v-4_6-lora", "qwen2_5-vl-3b-lora"])
def test_recipes_of_the_project(project: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need no file that is made first; data that are not here are stood in for."""
    monkeypatch.chdir(project)
    sets = ["data.train=null"]
    forecast = memfit.estimate(project / "recipes" / f"{name}.yaml", sets=sets)
    assert wrong(forecast) == []
