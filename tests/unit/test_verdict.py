"""The verdict rests on the memory that binds: the node's on CPU ranks, the card's and the node's on GPUs."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import memfit
from memfit.catalog.process import PROCESS
from memfit.cli import main
from memfit.errors import DoesNotFit
from memfit.inputs import machine
from memfit.planner.estimate_text import estimate_text
from memfit.planner.forecast_json import forecast_json
from memfit.planner.interval import uncertainty
from memfit.planner.verdict import host_room, with_verdict
from memfit.specs.plan import Forecast
from memfit.specs.recipe import Recipe

Make = Callable[..., Recipe]
GPU = ("hardware.gpus=1xRTX3090", "data.train=null", "workload.tokens=64", "levers.precision=auto")


def on_cpu(recipe: Make, *sets: str) -> Forecast:
    return memfit.estimate(recipe("llama", "data.train=null", "workload.tokens=64", *sets))


def test_a_cpu_run_rests_on_the_nodes_memory(recipe: Make) -> None:
    """To the byte: what is needed fits, one byte less does not, and the interval's upper end decides `borderline`."""
    node = on_cpu(recipe, "hardware.host_memory=64GiB").node
    assert node is not None
    assert node.peak_bytes < node.high_bytes < 2 * node.peak_bytes
    for room, verdict, fits, short in (
        (node.high_bytes, "fits", True, 0),
        (node.high_bytes - 1, "borderline", True, 0),
        (node.peak_bytes, "borderline", True, 0),
        (node.peak_bytes - 1, "does-not-fit", False, 1),
    ):
        data = forecast_json(on_cpu(recipe, f"hardware.host_memory={room} B"))
        assert (data["verdict"], data["fits"], data["gpu"]) == (verdict, fits, None)
        assert (data["host"]["capacity_bytes"], data["host"]["short_by_bytes"]) == (room, short)
        assert data["host"]["peak_bytes"] == node.peak_bytes
        phase = data["host"]["peak_phase"]
        assert sum(term["bytes"] for term in data["host"]["terms"] if phase in term["alive"]) == node.peak_bytes


def test_every_rank_and_the_command_that_starts_them_count(recipe: Make) -> None:
    one, two = (on_cpu(recipe, f"hardware.gpus={ranks}xcpu", "levers.parallel=auto") for ranks in (1, 2))
    bytes_of = [{term.id: term.bytes for term in forecast.ledger.terms} for forecast in (one, two)]
    assert bytes_of[1]["host.process"] == 2 * bytes_of[0]["host.process"]
    assert bytes_of[1]["host.libraries"] == bytes_of[0]["host.libraries"]
    assert ("host.launcher" in bytes_of[0], "host.launcher" in bytes_of[1]) == (False, True)
    zero = on_cpu(recipe, "hardware.gpus=2xcpu", "levers.parallel=zero2")
    assert "host.deepspeed" in {term.id for term in zero.ledger.terms}
    assert "host.cuda" not in {term.id for term in zero.ledger.terms}


def test_memory_that_is_not_stated_is_this_machines(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "host_memory_bytes", lambda: 2**40)
    found = on_cpu(recipe)
    assert (found.verdict, found.hardware.host_memory_bytes) == ("fits", 2**40)
    assert "hardware.host_memory" in found.defaults
    # A container with less than the run needs.
    monkeypatch.setattr(machine, "host_memory_bytes", lambda: 2**20)
    assert on_cpu(recipe).verdict == "does-not-fit"
    assert "hardware.host_memory" not in on_cpu(recipe, "hardware.host_memory=64GiB").defaults


@pytest.mark.parametrize("gpus", ["1xcpu", "2x2xcpu"])
def test_unknown_only_where_no_capacity_is_known(recipe: Make, monkeypatch: pytest.MonkeyPatch, gpus: str) -> None:
    monkeypatch.setattr(machine, "host_memory_bytes", lambda: None)
    found = on_cpu(recipe, f"hardware.gpus={gpus}", "levers.parallel=auto", "batch=8")
    data = forecast_json(found)
    assert (data["verdict"], data["fits"]) == ("unknown", None)
    assert (data["host"]["capacity_bytes"], data["host"]["short_by_bytes"]) == (None, None)
    assert "how much a node has is not known" in estimate_text(found)


def test_host_memory_can_bind_a_gpu_run(recipe: Make) -> None:
    def estimate(room: str) -> Forecast:
        return memfit.estimate(recipe("llama", *GPU, f"hardware.host_memory={room}"))

    roomy = estimate("64GiB")
    assert roomy.node is not None
    assert roomy.verdict == "fits"
    assert estimate_text(roomy).startswith("fits: the process peaks at")
    short = estimate(f"{roomy.node.peak_bytes - 1} B")
    data = forecast_json(short)
    assert (data["verdict"], data["fits"]) == ("does-not-fit", False)
    assert (data["gpu"]["short_by_bytes"], data["host"]["short_by_bytes"]) == (0, 1)
    assert re.match(r"does not fit \(host memory: .* needed, a node has .*, short by", estimate_text(short))
    close = estimate(f"{roomy.node.peak_bytes} B")
    assert (close.verdict, close.fits) == ("borderline", True)
    assert estimate_text(close).startswith("borderline (host memory: up to ")
    # Without a stated size the card alone decides: this machine is not the one that is planned for.
    unstated = memfit.estimate(recipe("llama", *GPU))
    assert (unstated.verdict, forecast_json(unstated)["host"]["short_by_bytes"]) == ("fits", None)


def test_the_command_ends_with_three_and_the_shortfall(
    recipe: Make, dummies: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["estimate", "--model", str(dummies("llama")), "--gpus", "1xcpu", "--set", "workload.tokens=64"]
    assert main([*words, "--host-memory", "64GiB"]) == 0
    assert capfd.readouterr().out.startswith("fits: host memory of a node peaks at")
    assert main([*words, "--host-memory", "1MiB"]) == 3
    out = capfd.readouterr().out
    assert re.match(r"does not fit: host memory of a node peaks at .*, a node has 1.00 MiB, short by ", out)
    assert main([*words, "--host-memory", "1MiB", "--json"]) == 3
    assert json.loads(capfd.readouterr().out)["host"]["short_by_bytes"] > 0


def test_training_is_refused_with_the_numbers(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"host memory peaks at .*, a node has 102.40 MiB, short by"):
        memfit.train(recipe("llava", "hardware.host_memory=0.1GiB"), say=lambda text: None)
    assert not (tmp_path / "run").exists()


def test_a_tenth_more_of_the_process_turns_the_verdict(recipe: Make) -> None:
    """The planted error: exactly what is needed is there, and one host term grows."""
    node = on_cpu(recipe, "hardware.host_memory=64GiB").node
    assert node is not None
    forecast = on_cpu(recipe, f"hardware.host_memory={node.peak_bytes} B")
    assert forecast.fits
    extra = int(0.1 * PROCESS[0])
    grown = dataclasses.replace(node, peak_bytes=node.peak_bytes + extra)
    planted: Any = with_verdict(dataclasses.replace(forecast, node=grown))
    assert planted.verdict == "does-not-fit"
    room = host_room(planted)
    assert room is not None
    assert room.short == extra


def test_host_terms_have_widths_of_their_own(recipe: Make) -> None:
    found = memfit.estimate(recipe("llama", *GPU))
    classes = {term.id: uncertainty(term) for term in found.ledger.at("host")}
    assert classes["host.cuda"] == "host-cuda"
    assert {name for term, name in classes.items() if term != "host.cuda"} == {"host"}


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux only")
def test_a_process_takes_about_what_the_row_says() -> None:
    """Imports alone; the row is of a rank after some steps, which adds a tenth."""
    code = (
        "import memfit.engine.train, re; text = open('/proc/self/smaps_rollup').read();"
        "print(1024 * int(re.search(r'Private_Dirty:\\s+(\\d+)', text)[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.7 * PROCESS[0] < int(done.stdout.split()[-1]) < 1.1 * PROCESS[0]
